"""Run the notebooks from top to bottom and store their outputs: python notebooks/execute.py"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

for path in sorted(Path(__file__).parent.glob("*.ipynb")):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times differ in each run
    notebook.metadata = KERNEL  # and so does the patch version of Python
    nbformat.write(notebook, path)
    print(path.name)
