"""What the package never does: run code that arrives as data, or unpickle anything."""

import ast
from pathlib import Path

import pytest

import asyncrl
from asyncrl.config import ModelConfig, RewardModelConfig

PACKAGE = Path(asyncrl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "code",
    "runpy",
}
NAMES = {"eval", "exec", "compile", "__import__"}
"""Builtins that nobody so much as mentions: `map(eval, texts)` does not call it by name."""
METHODS = {
    # torch.distributed pickles whatever these carry
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    # so do these of pyzmq, pandas, and multiprocessing between processes
    "send_pyobj",
    "recv_pyobj",
    "read_pickle",
    "to_pickle",
    "ProcessPoolExecutor",
    "system",
    "popen",
    "unsafe_load",
    "unsafe_load_all",
    "full_load",
    "full_load_all",
    "load_all",
}
FROM = {("torch", "load"), ("yaml", "load"), ("builtins", "eval"), ("builtins", "exec"), ("os", "system")}
"""What would be called by a bare name, past the rules for its module."""


def findings(source):
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [n.name for n in names if n.name.partition(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found = [module] if module.partition(".")[0] in MODULES else []
                found += [f"{module}.{n.name}" for n in names if (module, n.name) in FROM]
            case ast.Name(id=name, ctx=ast.Load()):
                found = [name] if name in NAMES else []
            case ast.Attribute(value=ast.Name(id="builtins"), attr=name):
                found = [f"builtins.{name}"] if name in NAMES else []
            case ast.AnnAssign(target=ast.Name(id="trust_remote_code"), value=ast.Constant(value=True)):
                found = ["trust_remote_code, unasked"]
            case ast.Call(func=ast.Attribute(attr=name, value=owner), args=args, keywords=keywords):
                found = list(bad_call(ast.unparse(owner), name, args, keywords))
            case _:
                found = []
        yield from ((node.lineno, what) for what in found)


def bad_call(owner, name, args, keywords):
    given = {k.arg: ast.unparse(k.value) for k in keywords}
    if name in METHODS:
        yield name
    if name in ("Process", "Queue", "Pipe", "Pool", "Manager") and "multiprocessing" in owner:
        yield f"{owner}.{name}, which pickles"
    if name == "load" and owner == "torch" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name == "load" and owner == "yaml" and [ast.unparse(a) for a in args[1:]] != ["_Loader"]:
        yield "yaml.load without the safe loader"
    for keyword in ("allow_pickle", "trust_remote_code", "shell"):
        if given.get(keyword) == "True":
            yield f"{keyword}=True"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_no_code_comes_out_of_data(path):
    assert list(findings(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "map(eval, texts)",
        "exec(compile(text, '', 'exec'))",
        "builtins.exec(text)",
        "from builtins import exec as run",
        "import runpy",
        "from torch import load",
        "from yaml import load",
        "yaml.load_all(text, yaml.Loader)",
        "socket.recv_pyobj()",
        "multiprocessing.Process(target=main).start()",
        "concurrent.futures.ProcessPoolExecutor()",
        "trust_remote_code: bool = True",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "np.load(path, allow_pickle=True)",
        "dist.broadcast_object_list(objects)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_it_would_be_found(source):
    assert list(findings(source))


def test_a_model_brings_no_code_unless_asked():
    assert ModelConfig(path="m").trust_remote_code is False
    assert RewardModelConfig(path="m").trust_remote_code is False
