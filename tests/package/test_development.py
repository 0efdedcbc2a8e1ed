"""The development commands: no test file is run by none of them, and a proof that was not given is not passed over."""

import sys
from pathlib import Path

import pytest

from checkouts import ROOT
from tools import environment, kernels
from tools.environment import CannotSetUp, Environment, project, requirements
from tools.kernels import PROOFS, Proof, Run, prove


def test_every_test_file_is_run_by_make_test_or_make_test_kernels():
    paths = project()["tool"]["pytest"]["ini_options"]["testpaths"]
    ordinary = {
        file for path in paths for file in ([ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("test_*.py"))
    }
    patterns = [pattern for proof in PROOFS for run in proof.runs for pattern in run.files]
    proving = {file for pattern in patterns for file in ROOT.glob(pattern)}
    assert set((ROOT / "tests").rglob("test_*.py")) == ordinary | proving
    # Interpreted and compiled Triton cannot share a process, so no session may collect them together.
    assert not [file for file in ordinary if "kernels" in file.relative_to(ROOT).parts]


def test_requirements_of_other_systems_are_left_out(monkeypatch):
    def names():
        return [requirement.partition(";")[0] for requirement in requirements("dev")]

    monkeypatch.setattr(sys, "platform", "linux")
    assert "triton>=3.6,<3.10" in names()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert names() and not [name for name in names() if name.startswith("triton")]


FILES = {
    "test_good.py": "def test_one(): pass\ndef test_two(): pass\n",
    "test_bad.py": "def test_one(): pass\ndef test_two(): assert False\n",
    "test_skipped.py": "import pytest\ndef test_one(): pass\ndef test_two(): pytest.skip('no nvcc here')\n",
    "test_broken.py": "import no_such_module\n",
    "test_environment.py": "import os\ndef test_one(): assert os.environ['PROVING'] == 'yes'\n",
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A checkout with these files and the proofs that a test asks for. Returns give(*runs): status and printed lines."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(kernels, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(kernels, "REPORTS", tmp_path / "reports")

    def give(capfd, **proofs):
        monkeypatch.setattr(kernels, "PROOFS", tuple(Proof(name, runs) for name, runs in proofs.items()))
        status = prove(Environment(Path(sys.executable), "", owned=False), [])
        return status, capfd.readouterr().out.splitlines()

    return give


def test_proofs_that_are_given_are_summed_up_on_the_last_line(tree, capfd):
    status, printed = tree(capfd, first=(Run(("test_g*.py",)),), second=(Run(("test_environment.py",), {"PROVING": "yes"}),))
    assert status == 0
    assert printed[-1].strip("= ").startswith("3 passed in ")
    assert any(line.startswith("proof 2, second: given: 1 passed in ") for line in printed)


@pytest.mark.parametrize(
    ("files", "counts", "remark"),
    [
        (("test_bad.py",), "1 failed, 1 passed", "failure: test_bad::test_two"),
        (("test_skipped.py",), "1 passed, 1 skipped", "not run: test_skipped::test_two: no nvcc here"),
        (("test_good.py", "test_absent_*.py"), "1 error", "expected tests in test_absent_*.py, found no such file"),
        (("test_broken.py",), "1 error", "error: ::test_broken"),
        (("test_environment.py",), "1 failed", "failure: test_environment::test_one"),
    ],
    ids=["failed", "skipped", "absent", "broken", "variables"],
)
def test_a_proof_that_is_not_given_is_a_failure_with_the_reason(tree, capfd, files, counts, remark):
    status, printed = tree(capfd, only=(Run(files),))
    assert status == 1
    assert printed[-1].strip("= ").startswith(f"{counts} in ")
    assert any(line.startswith("proof 1, only: NOT GIVEN: ") for line in printed)
    assert f"    {remark}" in printed


def test_proofs_are_chosen_by_name_or_number():
    assert kernels.chosen([]) == list(PROOFS)
    assert [proof.name for proof in kernels.chosen(["triton", "1"])] == [PROOFS[0].name, "triton"]
    with pytest.raises(CannotSetUp, match="'bogus'"):
        kernels.chosen(["bogus"])
