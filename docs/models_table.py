"""Write the table of docs/models.md from test results.

make models

Runs tests/test_families.py with both versions of TransformerLens and calls this with the results of each:
python docs/models_table.py 3.9.0=results.xml 4.3.0=other.xml
"""

import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parent / "models.md"
BEGIN, END = "<!-- table: python docs/models_table.py -->\n", "<!-- end of table -->\n"

NAMES = {
    "gpt2": "GPT-2", "gpt-neo": "GPT-Neo", "gpt-j": "GPT-J", "opt": "OPT", "pythia": "Pythia, GPT-NeoX",
    "neox-sequential": "GPT-NeoX, not parallel", "llama2": "Llama 2", "llama3": "Llama 3", "mistral": "Mistral",
    "qwen2": "Qwen2", "qwen2.5": "Qwen2.5", "qwen3": "Qwen3", "phi2": "Phi-2", "phi3": "Phi-3", "gemma1": "Gemma",
    "gemma2": "Gemma 2", "gemma3": "Gemma 3", "olmo2": "OLMo 2", "olmo2-grouped": "OLMo 2, grouped queries",
    "stablelm": "StableLM", "falcon": "Falcon (7B)", "falcon-rw": "Falcon (RW)", "bloom": "BLOOM",
    "mixtral": "Mixtral", "qwen2-moe": "Qwen2-MoE", "qwen3-moe": "Qwen3-MoE",
}  # fmt: skip

COLUMNS = {
    "tokens": (
        "test_scores_of_the_token_graph",
        "test_circuits_of_the_token_graph",
        "test_minimal_sizes_of_the_token_graph",
    ),
    "components": ("test_scores_of_the_component_graph", "test_circuits_of_the_component_graph"),
    "keys and values of every head": (
        "test_scores_where_every_head_has_keys_and_values_of_its_own",
        "test_circuits_where_every_head_has_keys_and_values_of_its_own",
    ),
    "neurons": ("test_neurons_are_told_apart",),
}  # fmt: skip
REFUSALS = {
    "test_the_token_graph_of_parallel_blocks_is_refused": ("tokens", "refused: parallel"),
    "test_keys_that_are_normed_together_are_not_ungrouped": (
        "keys and values of every head",
        "refused: normed together",
    ),
    "test_neurons_of_experts_are_refused": ("neurons", "refused: experts"),
}  # fmt: skip


def results(file: Path) -> dict[tuple[str, str, str], bool]:
    """Whether every test of a function, family and class passed."""
    passed: dict[tuple[str, str, str], bool] = defaultdict(lambda: True)
    for case in ElementTree.parse(file).iter("testcase"):
        found = re.fullmatch(r"(\w+)\[(.+?)-(HookedTransformer|TransformerBridge)(?:-.+)?\]", case.attrib["name"])
        if found and case.find("skipped") is None:
            key = (found[1], found[2], found[3])
            passed[key] = passed[key] and case.find("failure") is None and case.find("error") is None
    return passed


def table(by_version: dict[str, dict[tuple[str, str, str], bool]]) -> str:
    """One row per family, class and version."""
    lines = [f"| family | class | TransformerLens | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for family, shown in NAMES.items():
        for kind in ("HookedTransformer", "TransformerBridge"):
            for version, passed in by_version.items():
                if not any(key[1:] == (family, kind) for key in passed):
                    continue
                cells = []
                for column, tests in COLUMNS.items():
                    run = [passed[test, family, kind] for test in tests if (test, family, kind) in passed]
                    refused = [
                        text if passed[test, family, kind] else "NOT refused"
                        for test, (where, text) in REFUSALS.items()
                        if where == column and (test, family, kind) in passed
                    ]
                    cells.append(refused[0] if refused else "" if not run else "✓" if all(run) else "FAILS")
                lines.append(f"| {shown} | {kind} | {version} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Put the table between the marks of the page."""
    files = dict(argument.split("=", 1) for argument in arguments)
    made = table({version: results(Path(file)) for version, file in files.items()})
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(page[:before] + made + page[after:], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
