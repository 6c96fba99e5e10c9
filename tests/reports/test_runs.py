"""Run folders of others, compared."""

import pytest

from jlora.reports.runs import compare

ANCHORS = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{{', '.join(f'k{i}: *{chr(97 + n)}' for i in range(9))}}}\n" for n in range(9)
)
CONFIGS = {
    "anchors": ANCHORS,
    "a date": "a: 2020-99-99\n",
    "a long integer": "a: " + "9" * 5000 + "\n",
    "deep": "a: " + "[" * 20000,
    "long": "a: 1\n" * 20000,
    "a tag": "a: !!python/object/apply:os.system [true]\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_left_out_of_the_comparison(name, tmp_path):
    """Nine anchors of nine keys stand for 9^9 values."""
    for run, text in (("good", "lora: {rank: 4}\n"), ("bad", CONFIGS[name])):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text(text, encoding="utf-8")
        (tmp_path / run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    assert "lora.rank" in compare([tmp_path / "good", tmp_path / "bad"])
