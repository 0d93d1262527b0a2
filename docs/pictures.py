"""Make the pictures of the README from real runs of a bundled model: ``python docs/pictures.py``.

Needs the extra `image`, kaleido, and with it a Chrome or Chromium on the machine.
"""

from pathlib import Path

import tracedensity as td

PROMPT = "said the old man, and shook his"
FOLDER = Path(__file__).parent / "images"


def main() -> None:
    """Write the curve and the circuit of the README."""
    FOLDER.mkdir(exist_ok=True)
    curve = td.density(td.load_model("books-llama"), PROMPT)
    print(curve)
    curve.plot().write_image(FOLDER / "curve.png", width=900, height=520, scale=1.5)
    curve.circuit(faithfulness=0.9).plot().write_image(FOLDER / "circuit.png", width=900, height=520, scale=1.5)


if __name__ == "__main__":
    main()
