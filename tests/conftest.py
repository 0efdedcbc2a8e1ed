"""What every test starts from, and for which backends and on which device.

``--backends native,triton`` runs the tests that take a backend with these instead of the CPU's three, and no others;
``emulated`` is the CUDA library run over fibers (``tests/kernels``). ``--device cuda`` puts every tensor there, and leaves out
what is about the CPU (marker ``cpu_only``), by name in the summary and in the file of ``--left-out``.
"""

import os
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest

CPU_BACKENDS = ("reference", "foreach", "native")

# Those that have a second door, through a prepared set, and what tests call it.
SECOND_DOOR = {"native": "prepared", "triton": "prepared-triton", "emulated": "prepared-emulated"}


def pytest_addoption(parser):
    parser.addoption("--backends", help="comma-separated: only the tests that take a backend, for these")
    parser.addoption("--device", default="cpu", help="where tensors are made that name no device")
    parser.addoption("--left-out", metavar="FILE", help="where to list the cpu_only tests that another --device leaves out")


def _backends(config):
    chosen = config.getoption("--backends")
    return tuple(chosen.split(",")) if chosen else CPU_BACKENDS


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_only: about the CPU whatever the device: left out with another --device")
    if "emulated" in _backends(config):
        from tests.kernels import emulated_backend

        config.stash[_EMULATED] = emulated_backend.install(emulated_backend.built_once())
    if config.getoption("--device") != "cpu":
        import torch

        torch.set_default_device(config.getoption("--device"))


_EMULATED = pytest.StashKey()


def _named_by(parametrize):
    names = parametrize.args[0]
    return {name.strip() for name in (names.split(",") if isinstance(names, str) else names)}


def pytest_generate_tests(metafunc):
    """``backend`` is a backend's name; ``runner`` a door into one."""
    backends = _backends(metafunc.config)
    doors = [*backends, *(SECOND_DOOR[name] for name in backends if name in SECOND_DOOR)]
    already = set().union(*map(_named_by, metafunc.definition.iter_markers("parametrize")))
    for fixture, values in (("backend", backends), ("runner", doors)):
        if fixture in metafunc.fixturenames and fixture not in already:
            metafunc.parametrize(fixture, values, indirect=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cpu":
        _leave_out_what_is_about_the_cpu(config, items)
    elif config.getoption("--backends"):
        _keep(config, items, [item for item in items if {"backend", "runner"} & set(getattr(item, "fixturenames", ()))])


def _keep(config, items, kept):
    left = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = kept


_LEFT_OUT = pytest.StashKey()


def _leave_out_what_is_about_the_cpu(config, items):
    left = [item.nodeid for item in items if item.get_closest_marker("cpu_only")]
    _keep(config, items, [item for item in items if not item.get_closest_marker("cpu_only")])
    config.stash[_LEFT_OUT] = left
    # Of several processes each collects the same, and nobody tells the first what they left out: one of them writes it down.
    file = config.getoption("--left-out")
    if file and getattr(config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0":
        Path(file).write_text("".join(f"{name}\n" for name in left), encoding="utf-8")


def pytest_terminal_summary(terminalreporter, config):
    left = config.stash.get(_LEFT_OUT, [])
    if left:
        terminalreporter.section(f"{len(left)} tests left out: they are about the CPU")
        for name, count in Counter(name.split("[")[0] for name in left).items():
            terminalreporter.line(f"{count:4} {name}")


@pytest.fixture(autouse=True)
def _seed_and_threads():
    """The same random numbers whichever tests run, and torch's thread count as it was found."""
    # Not imported here: some tests never need torch, and importing it takes longer than they do.
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _orders_of_the_emulation(request):
    """Each test has an order of threads and one of blocks, by its name; results may depend on neither."""
    emulated = request.config.stash.get(_EMULATED, None)
    if emulated is not None:
        from tests.kernels.build_emulated import ORDERS

        number = zlib.crc32(request.node.nodeid.encode())
        emulated.set_orders(ORDERS[number % 3], ORDERS[number // 3 % 3], seed=number)


@pytest.fixture(autouse=True)
def _mended_interpreter(request, monkeypatch):
    """``TRITON_INTERPRET=1 pytest --backends triton``: what Triton's interpreter rounds differently from a card is mended."""
    if "triton" in _backends(request.config) and os.environ.get("TRITON_INTERPRET") == "1":
        from tests.kernels import triton_arithmetic

        triton_arithmetic.mend(monkeypatch)
