"""What we use of other libraries in private: it is there and as we think; only diffhook/compat uses it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from zarr.storage import LocalStore, MemoryStore

from diffhook.compat import accelerate as of_accelerate
from diffhook.compat import fsdp as of_fsdp
from diffhook.compat import torch as of_torch
from diffhook.compat import zarr as of_zarr

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "_asdict",
    "_fields",
    "_replace",
    "_make",
    "_version",
    "_foreach_norm",
    "_foreach_zero_",
}  # documented, or numbered
KNOWN = {  # names of classes that we know models by, and hooks that a test looks for, in files that say why
    "diffhook/capture/loop/testing.py",
    "integrations/launcher.py",
}


def test_no_other_file_uses_a_private_name_of_another_library() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sources()}
    own = {name for tree in trees.values() for name in defined(tree)}
    for path, tree in trees.items():
        where = path.relative_to(ROOT).as_posix()
        if where.startswith("diffhook/compat/") or where in KNOWN:
            continue
        private = set(used(tree)) - own - PUBLIC
        assert not private, f"{where} uses {sorted(private)}: give it a name in diffhook/compat"


def sources() -> Iterator[Path]:
    for folder in ("diffhook", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            if "diffhook/integrations" not in path.as_posix():
                yield path


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "self.__dict__":
            yield str(getattr(node.slice, "value", ""))


def used(tree: ast.AST) -> Iterator[str]:
    """Private attributes that it reads, and private modules and names that it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("diffhook"):
            yield from (name for name in (node.module or "").split(".") if is_private(name))
            yield from (alias.name for alias in node.names if is_private(alias.name))
            if (node.module or "").startswith("zarr.core"):
                yield str(node.module)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


class TestTorch:
    def test_a_backward_is_known_from_within(self) -> None:
        seen = []
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda _: seen.append(of_torch.in_backward()))
        x.sum().backward()
        assert (seen, of_torch.in_backward()) == ([True], False)

    def test_a_node_tells_what_it_saved(self) -> None:
        x, y = torch.ones(2, requires_grad=True), torch.full((2,), 3.0)
        assert torch.equal(of_torch.saved((x * y).grad_fn, "other"), y)
        assert of_torch.saved((x**2).grad_fn, "exponent") == 2
        assert torch.equal(of_torch.saved(nn.functional.mse_loss(x, y).grad_fn, "target"), y)
        assert of_torch.saved((x + y).grad_fn, "target") is None
        freed = nn.functional.mse_loss(x, y)
        freed.backward()
        assert of_torch.saved(freed.grad_fn, "self") is None

    def test_a_view_has_a_base_and_hooks_are_counted(self) -> None:
        x = torch.ones(4, requires_grad=True)
        y = x * 1
        assert of_torch.view_base(y.view(2, 2)) is y
        assert of_torch.view_base(y) is None
        assert of_torch.gradient_hooks(x) == 0
        x.register_hook(lambda grad: grad)
        assert of_torch.gradient_hooks(x) == 1

    def test_modules_list_their_own(self) -> None:
        layer = nn.Linear(2, 3, bias=False)
        outer = nn.Sequential(layer, layer)
        assert list(of_torch.own_parameters(layer)) == ["weight", "bias"]
        assert list(of_torch.own_children(outer)) == ["0", "1"]
        assert of_torch.padding_amounts(nn.Conv2d(1, 1, 3, padding=(1, 2))) == (2, 2, 1, 1)
        assert isinstance(nn.BatchNorm2d(1), of_torch.BatchNorm)
        assert isinstance(nn.InstanceNorm2d(1), of_torch.NormBase)

    def test_a_compiled_call_is_known_of_a_wrapper_and_of_a_module_compiled_in_place(self) -> None:
        plain, wrapped = nn.Linear(1, 1), torch.compile(nn.Linear(1, 1), backend="eager")
        in_place = nn.Linear(1, 1)
        in_place.compile(backend="eager")
        assert of_torch.compiler_is_loaded()
        assert list(map(of_torch.has_compiled_call, (plain, wrapped, in_place))) == [False, True, True]

    def test_nothing_is_left_of_a_hook_on_every_module(self) -> None:
        seen = []
        handle = of_torch.every_modules_hook(lambda *call: seen.append(call[2:]))
        nn.Identity()(input=1)
        handle.remove()
        nn.Identity()(input=2)
        assert seen == [({"input": 1}, 1)]
        assert not nn.modules.module._global_forward_hooks
        assert not nn.modules.module._global_forward_hooks_always_called

    def test_a_mode_lies_under_the_others_and_comes_off_from_there(self) -> None:
        seen = []

        class Named(TorchFunctionMode):
            def __init__(self, name: str) -> None:
                super().__init__()
                self.name = name

            def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                seen.append(self.name)
                return func(*args, **(kwargs or {}))

        lowest = Named("lowest")
        with Named("upper"):
            of_torch.put_function_mode_lowest(lowest)
            torch.ones(1).add(1)
            assert seen[-2:] == ["upper", "lowest"]
            assert of_torch.function_modes() == 2
            with of_torch.without_function_modes():
                torch.ones(1).add(1)
            count = len(seen)
            of_torch.take_off_function_mode(lowest)
            torch.ones(1).add(1)
            assert "lowest" not in seen[count:]
        assert of_torch.function_modes() == 0

    def test_an_iterator_of_a_loader_tells_its_dataset(self) -> None:
        data = [torch.zeros(1)] * 3
        iterator = iter(DataLoader(data))  # type: ignore[arg-type]
        assert isinstance(iterator, of_torch.LoaderIterator)
        assert of_torch.fetched_dataset(iterator) is data

    def test_the_processes_store_is_the_one_they_met_by(self, tmp_path: Path) -> None:
        script = (
            "import sys, torch.distributed as dist\n"
            "from diffhook.compat.torch import process_store\n"
            "dist.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1)\n"
            "process_store('ours').set('key', 'value')\n"
            "assert process_store('ours').get('key') == b'value'\n"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "meet")], check=True, timeout=120)


class TestFSDP:
    """Of one process, whose share is everything."""

    @pytest.fixture
    def mesh(self, tmp_path: Path) -> Iterator[Any]:
        dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    @pytest.mark.parametrize("new", [True, False])
    def test_a_unit_tells_what_it_has_taken_and_what_stands_for_it(self, new: bool, mesh: Any) -> None:
        layer = nn.Linear(2, 3)
        made = fully_shard(layer, mesh=mesh) if new else _wrapped(layer, mesh, orig=True)
        (unit,) = of_fsdp.units(made)
        assert (unit.outer, unit.inner) == (made, layer)
        assert list(of_fsdp.processes(unit)) == ([1, 1] if new else [1])
        assert of_fsdp.keeps_parameters(unit)
        held = {one.name: one for one in of_fsdp.held(unit)}
        assert {name: tuple(one.shape) for name, one in held.items()} == {"weight": (3, 2), "bias": (3,)}
        before = dict(made.named_parameters())
        assert {id(one.parameter) for one in held.values()} == {id(p) for p in before.values()}
        seen: list[Any] = []
        layer.register_forward_pre_hook(lambda *_: seen.append(of_fsdp.standing(layer, "weight")))
        made(torch.ones(1, 2)).sum().backward()
        assert tuple(seen[0].shape) == (3, 2)
        assert type(seen[0].data) is torch.Tensor
        assert of_fsdp.standing(layer, "weight") is held["weight"].parameter

    def test_flat_parameters_and_wrappers_are_known(self, mesh: Any) -> None:
        wrapped = _wrapped(nn.Linear(2, 3), mesh, orig=False)
        assert not of_fsdp.keeps_parameters(of_fsdp.units(wrapped)[0])
        assert of_fsdp.wraps(wrapped)
        assert not of_fsdp.wraps(wrapped.module)

    def test_a_class_is_that_of_before(self, mesh: Any) -> None:
        layer = nn.Linear(2, 3)
        fully_shard(layer, mesh=mesh)
        assert type(layer) is not nn.Linear
        assert of_fsdp.plain_class(layer) is of_fsdp.plain_class(nn.Linear(1, 1)) is nn.Linear


def _wrapped(layer: nn.Module, mesh: Any, *, orig: bool) -> Any:
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(layer, device_id=cpu, device_mesh=mesh, use_orig_params=orig)


def test_zarr_refuses_to_write_what_was_opened_for_reading(tmp_path: Path) -> None:
    of_zarr.check_writable(MemoryStore())
    with pytest.raises(ValueError, match="read-only"):
        of_zarr.check_writable(LocalStore(tmp_path, read_only=True))


def test_accelerate_lists_what_it_prepared() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    given = (model, torch.optim.SGD(model.parameters()), DataLoader([0, 1]))
    made = accelerator.prepare(*given)
    found = of_accelerate.prepared(accelerator)
    assert (found.models, found.optimizers, found.loaders) == ([made[0]], [made[1]], [made[2]])


def test_what_is_called_before_threads_end_still_has_them() -> None:
    script = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from diffhook.compat.python import before_threads_end\n"
        "pool = ThreadPoolExecutor()\n"
        "before_threads_end(lambda: print(pool.submit(lambda: 'they work').result(), flush=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "they work\n", done.stderr


def test_a_hook_that_comes_first_changes_the_gradient_that_earlier_ones_see() -> None:
    leaf = torch.ones(3, requires_grad=True)
    tensor, seen = leaf * 1, []
    early = tensor.register_hook(lambda gradient: seen.append(float(gradient[0])))
    of_torch.hook_first(tensor, lambda gradient: gradient * 2)
    tensor.register_hook(lambda gradient: seen.append(float(gradient[0])))
    tensor.sum().backward(retain_graph=True)
    assert seen == [2.0, 2.0]
    early.remove()
    tensor.sum().backward()
    assert seen == [2.0, 2.0, 2.0]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [4.0] * 3
