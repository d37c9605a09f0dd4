"""A program for `python -c` that runs a script which can import neither Ray nor torch, as on a robot."""

BLOCKED = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "torch"):
            raise ImportError(f"{name} is not to be imported here")
sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
