"""What the vLLM engine uses of vLLM, and whether a vLLM has it: without importing or running any.

    pip download --no-deps vllm==0.32.0
    python benchmarks/vllm_contract.py vllm-0.32.0-*.whl      the CUDA build's wheel, or a folder with `vllm`

Uses are found in our own code by its syntax tree: every name that is imported from vLLM, every keyword that
it is called with, every `VLLM_` variable of the environment, every dotted name that begins with `vllm.`, and
what is taken off the objects that `OBJECTS` names. Each is then looked for in vLLM's sources, by theirs. The
wheel of the CUDA build holds the code of the GPU's workers and of both model runners, which the CPU build's
tests never run.

The findings (`--out`) are kept in the project; the tests hold our code, and an installed CPU build, against
them. What is missing is printed, and gives status 1.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ENGINE = Path(__file__).parents[1] / "asyncrl" / "rollout" / "engines" / "vllm"
DEFAULT_OUT = Path(__file__).parents[1] / "tests" / "rollout" / "engines" / "vllm_contract.json"

_LINEAR = "vllm.model_executor.layers.linear"
_WORKERS = ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
_RUNNERS = (
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
)
_LAYERS = (
    *(
        f"{_LINEAR}.{kind}"
        for kind in ("QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear")
    ),
    "vllm.model_executor.layers.vocab_parallel_embedding.ParallelLMHead",
)
OBJECTS: dict[str, dict[str, tuple[str, ...]]] = {
    "*": {
        "llm": ("vllm.v1.engine.async_llm.AsyncLLM",),
        "_llm": ("vllm.v1.engine.async_llm.AsyncLLM",),
        "core": ("vllm.v1.engine.core_client.AsyncMPClient",),
    },
    "generation.py": {
        "output": ("vllm.outputs.RequestOutput",),
        "completion": ("vllm.outputs.CompletionOutput",),
        "final": ("vllm.outputs.CompletionOutput",),
        "span": ("vllm.outputs.WeightVersionSpan",),
        "logprobs": ("vllm.logprobs.FlatLogprobs",),
        "scores": ("vllm.logprobs.Logprob",),
        "model": ("vllm.config.model.ModelConfig",),
        "sampling_mask": ("vllm.outputs.SamplingMask",),
    },
    "launch.py": {
        "config": ("vllm.config.vllm.VllmConfig",),
        "cache_config": ("vllm.config.cache.CacheConfig",),
        "scheduler_config": ("vllm.config.scheduler.SchedulerConfig",),
        "model": ("vllm.config.model.ModelConfig",),
        "model_config": ("vllm.config.model.ModelConfig",),
        "current_platform": ("vllm.platforms.cuda.NvmlCudaPlatform",),
    },
    "receiver.py": {"worker": _WORKERS, "model_runner": _RUNNERS},
    "experts.py": {
        "module": ("vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts",),
        "moe": ("vllm.model_executor.layers.fused_moe.config.FusedMoEConfig",),
        "quant_method": (
            "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod",
        ),
    },
    "layout.py": {
        "shard": ("vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbeddingShardIndices",)
    },
}
"""By file, the classes of the vLLM objects that our code has under these names. Each of them must have what
is taken off it."""
ONE_OF = {"layout.py": {"module": _LAYERS}}
"""The same where one class of them must."""
_DOTTED = re.compile(r"vllm(\.\w+)+")
TORCHS = frozenset({"named_modules", "named_parameters", "get_parameter", "modules"})
"""What `torch.nn.Module` gives to all."""


@dataclass(frozen=True, order=True, slots=True)
class Use:
    """`name` with these keywords. `of`: what each, or one, of these classes has to have it as."""

    name: str
    of: tuple[str, ...] = ()
    one_is_enough: bool = False
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        owner = f"{(' or ' if self.one_is_enough else ' and ').join(self.of)}." if self.of else ""
        return f"{owner}{self.name}" + (f"({', '.join(self.keywords)})" if self.keywords else "")


# ---- our code ----------------------------------------------------------------------------------------------


def uses(folder: Path = ENGINE) -> list[Use]:
    """What the modules of `folder` use of vLLM."""
    found: set[Use] = set()
    for path in sorted(folder.glob("*.py")):
        found.update(_uses_in(ast.parse(path.read_text()), path.name))
    return sorted(found)


def _uses_in(tree: ast.Module, file: str) -> Iterator[Use]:
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    yield from (Use(name) for name in imported.values())
    every = OBJECTS["*"] | OBJECTS.get(file, {})
    one = ONE_OF.get(file, {})
    keywords = {id(n.func): tuple(sorted(k.arg for k in n.keywords if k.arg)) for n in _calls(tree)}
    for node in ast.walk(tree):
        given = keywords.get(id(node), ())
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("VLLM_"):
                yield Use(node.value, ("vllm.envs",))
            elif _DOTTED.fullmatch(node.value):
                yield Use(node.value)
        elif isinstance(node, ast.Name) and node.id in imported and given:
            yield Use(imported[node.id], keywords=given)
        elif isinstance(node, ast.Attribute) and not _is_torchs(node):
            owner = _last_name(node.value)
            if owner in imported and owner not in every:
                yield Use(node.attr, (imported[owner],), keywords=given)
            elif owner in every or owner in one:
                classes = every.get(owner) or one[owner]
                yield Use(node.attr, classes, owner in one, given)


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _is_torchs(node: ast.Attribute) -> bool:
    return node.attr in TORCHS or ast.unparse(node).startswith("torch.")


def _last_name(node: ast.expr) -> str:
    """Of `a.b.c` and of `c[0][1]`: c."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def extension_names(folder: Path = ENGINE) -> list[str]:
    """What the worker extension brings into vLLM's workers: vLLM refuses one that has any of their names."""
    tree = ast.parse((folder / "receiver.py").read_text())
    (receiver,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "WeightReceiver")
    return sorted({name for name, value in _members(receiver) if value is not None})


# ---- vLLM's ------------------------------------------------------------------------------------------------


class Sources:
    """The modules of a wheel, or of a folder that holds the package."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wheel = zipfile.ZipFile(path) if path.is_file() else None
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            stem = name.replace(".", "/")
            package = f"{name}.__init__"
            for file, full_name in ((f"{stem}.py", name), (f"{stem}/__init__.py", package)):
                if (text := self._read(file)) is not None:
                    self._modules[name] = Module(full_name, ast.parse(text), text)
                    break
            else:
                self._modules[name] = None
        return self._modules[name]

    def _read(self, file: str) -> str | None:
        if self._wheel is not None:
            return self._wheel.read(file).decode() if file in self._wheel.namelist() else None
        path = self._path / file
        return path.read_text() if path.is_file() else None

    def find(self, name: str) -> tuple[Module, ast.stmt] | None:
        """Where a dotted name is defined, through imports from module to module."""
        if self.module(name) is not None:
            return None
        parent, _, last = name.rpartition(".")
        module = self.module(parent) if parent else None
        node = module.names.get(last) if module is not None else None
        if module is None or node is None:
            return None
        if isinstance(node, ast.ImportFrom):
            return self.find(_imported(node, module, last))
        return module, node

    def has(self, name: str) -> bool:
        return self.module(name) is not None or self.find(name) is not None

    def member(self, owner: str, name: str) -> ast.AST | None:
        """A class's own or inherited member; of a module, its name."""
        module = self.module(owner)
        if module is not None:
            return module.names.get(name) or module.literal(name)
        found = self.find(owner)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        module, definition = found
        own = dict(_members(definition))
        if name in own:
            return own[name] or definition
        for base in definition.bases:
            base_name = ast.unparse(base).split("[")[0]
            origin = f"{module.name.removesuffix('.__init__')}.{base_name}"
            if (inherited := self.member(origin, name)) is not None:
                return inherited
        return None

    def keywords(self, name: str) -> set[str] | None:
        """What a function or class takes, None where it takes any, or is neither."""
        found = self.find(name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None if found is None else parameters(found[1])
        module, definition = found
        init = dict(_members(definition)).get("__init__")
        if init is not None:
            return parameters(init)
        fields = {
            node.target.id
            for node in definition.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        package = module.name.removesuffix(".__init__")
        bases = [self.keywords(f"{package}.{ast.unparse(base)}") or set() for base in definition.bases]
        return fields.union(*bases)


def parameters(node: ast.AST) -> set[str] | None:
    """Keywords that a function takes, None where it takes any, or is none."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.args.kwarg is not None:
        return None
    a = node.args
    return {p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)} - {"self", "cls"}


@dataclass(frozen=True)
class Module:
    name: str
    tree: ast.Module
    text: str

    @cached_property
    def names(self) -> Mapping[str, ast.stmt]:
        """Of everything that is defined or imported in it, also under `if` and `try`."""
        found: dict[str, ast.stmt] = {}
        for node in _statements(self.tree.body):
            for name in _defined(node):
                found.setdefault(name, node)
        return found

    def literal(self, name: str) -> ast.AST | None:
        """A text in it: vLLM's variables of the environment are keys of a dictionary."""
        return self.tree if f'"{name}"' in self.text else None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def _imported(node: ast.ImportFrom, module: Module, name: str) -> str:
    original = next(a.name for a in node.names if (a.asname or a.name) == name)
    if not node.level:
        return f"{node.module}.{original}"
    parts = module.name.split(".")[: -node.level]
    return ".".join([*parts, *([node.module] if node.module else []), original])


def _members(definition: ast.ClassDef) -> Iterator[tuple[str, ast.AST | None]]:
    """Names of a class with what they are: functions, values, None where only annotated; and what its
    functions set on `self`."""
    for node in definition.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value
        elif isinstance(node, ast.Assign):
            yield from ((t.id, node.value) for t in node.targets if isinstance(t, ast.Name))
    for function in definition.body:
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                if is_set and _last_name(node.value) == "self":
                    yield node.attr, function


# ---- both --------------------------------------------------------------------------------------------------


def missing(use: Use, vllm: Sources) -> str | None:
    """What a vLLM lacks of a use, None when it has it."""
    if not use.of:
        if not vllm.has(use.name):
            return f"{use.name} is gone"
        return _refused(use, use.name, vllm.keywords(use.name))
    lacks = []
    for owner in use.of:
        node = vllm.member(owner, use.name)
        if node is None:
            lacks.append(f"{owner} has no {use.name}")
        elif refused := _refused(use, f"{owner}.{use.name}", parameters(node)):
            lacks.append(refused)
    enough = len(lacks) < len(use.of) if use.one_is_enough else not lacks
    return None if enough else "; ".join(lacks)


def _refused(use: Use, name: str, taken: set[str] | None) -> str | None:
    if taken is None or not (unknown := set(use.keywords) - taken):
        return None
    return f"{name} takes no {', '.join(sorted(unknown))}"


def clashes(vllm: Sources, names: list[str]) -> list[str]:
    return [f"{w} has a {name} of its own" for w in _WORKERS for name in names if vllm.member(w, name)]


def problems(vllm: Sources, folder: Path = ENGINE) -> list[str]:
    """Everything that our code in `folder` uses and that a vLLM does not have."""
    lacking = [text for use in uses(folder) if (text := missing(use, vllm)) is not None]
    return lacking + clashes(vllm, extension_names(folder))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vllm", type=Path, help="a wheel, or the folder that holds the package")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    found = problems(Sources(arguments.vllm))
    print("\n".join(found) or f"{arguments.vllm.name} has all {len(uses())} things that the engine uses")
    if not found:
        kept = {
            "checked": arguments.vllm.name,
            "has": [str(use) for use in uses()],
            "free": extension_names(),
        }
        arguments.out.write_text(json.dumps(kept, indent=1) + "\n")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
