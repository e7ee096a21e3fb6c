"""``python FOLDER``: serve one candidate over stdin and stdout. ``python FOLDER TASK``: see
``apart``."""

import importlib.util
import pathlib
import sys

_NAME = "benchmark_worker"


def _import_folder() -> None:
    """Make this folder the package ``benchmark_worker``, without putting it or its neighbours on
    the path: their names (``warnings``, ``timing``) would hide other modules."""
    folder = pathlib.Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.path.pop(0)
    _import_folder()
    if len(sys.argv) > 1:
        from benchmark_worker import apart

        apart.main(sys.argv[1])
    else:
        from benchmark_worker.serve import main

        main()
