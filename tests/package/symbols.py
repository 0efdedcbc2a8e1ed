"""What a compiled library wants from others and offers to them."""

import re
import shutil
import subprocess

import pytest

LINKERS = {"_init", "_fini", "_edata", "_end", "__bss_start"}


class DynamicSymbols:
    def __init__(self, library):
        if shutil.which("nm") is None:
            pytest.skip("needs nm")
        listing = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
        rows = [line.split()[-2:] for line in listing.splitlines()]
        self.wanted = {name.split("@")[0] for kind, name in rows if kind == "U"}
        self.offered = {name.split("@")[0] for kind, name in rows if kind in "TDBR"}

    def check_wanted(self):
        """Only the stable ABIs of torch and of Python."""
        # Mangled names of torch's namespaces (at, c10, torch) are what changes between its versions.
        assert not [name for name in self.wanted if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]
        # Python's private names, and its immortal-object layout, are outside the limited API.
        assert not [name for name in self.wanted if name.startswith("_Py") and not name.endswith("Struct")]
        assert any(name.startswith(("aoti_torch_", "torch_")) for name in self.wanted)

    def check_offered(self, entry_point):
        """The module's entry point and nothing else of ours."""
        own = {
            name for name in self.offered if not name.startswith("_Z")
        }  # inline functions of the C++ library stay weak or not
        assert own - LINKERS == {entry_point}
        assert not [name for name in self.offered if "sam_fused" in name]
