"""A worker extension of the vLLM servers under test. Without being asked to, it changes nothing."""

import time


class WorkerForTests:
    """Mixed into vLLM's worker class."""

    def asyncrl_pace(self, step_s):
        """From now on, wait this long before each step."""
        execute = type(self.model_runner).execute_model.__get__(self.model_runner)

        def paced(*args, **kwargs):
            time.sleep(step_s)
            return execute(*args, **kwargs)

        self.model_runner.execute_model = paced

    def asyncrl_fail_loads(self, times, how):
        """The next `times` loads break off `half-way`, or leave a layer out and are `silent` about it. 0:
        none any more."""
        from safetensors.torch import load_file

        load = type(self).reload_weights.__get__(self)
        left = times
        self.__dict__.pop("reload_weights", None)
        if not times:
            return

        def fail(weights_path):
            nonlocal left
            left -= 1
            if left == 0:
                del self.reload_weights
            tensors = load_file(f"{weights_path}/model.safetensors")
            names = list(tensors)
            if how == "silent":
                names.remove("model.layers.1.mlp.down_proj.weight")
            else:
                names = names[: len(names) // 2]
            load(weights_iterator=iter([(name, tensors[name]) for name in names]))
            if how == "half-way":
                raise RuntimeError("out of memory, say")

        self.reload_weights = fail
