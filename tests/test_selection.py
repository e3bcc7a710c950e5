"""The one selector: what it chooses, and what it says when it cannot."""

import numpy as np
import pytest

from ntk.errors import InputError
from ntk.selection import select
from tests.helpers import unchecked

PATHS = ["embed", "layers.0.mlp", "layers.1.mlp", "layers.10.mlp", "head"]


def chosen(selection, paths=PATHS, **options):
    return select(selection, paths, argument="wrt", noun="part", **options)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, [0, 1, 2, 3, 4]),
        (r"layers\.1\.mlp", [2]),
        (r"layers\.\d+\.mlp", [1, 2, 3]),
        (".*", [0, 1, 2, 3, 4]),
        ("head|embed", [0, 4]),
        (0, [0]),
        (-1, [4]),
        (np.int64(2), [2]),
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [3, 4]),
        ([3, -5, 3], [0, 3]),
        (np.array([1, 2]), [1, 2]),
        (range(2), [0, 1]),
        (lambda path: path.endswith("mlp"), [1, 2, 3]),
    ],
)
def test_what_is_chosen(selection, expected):
    assert chosen(selection) == expected


def test_functions_are_called_with_items():
    assert chosen(lambda width: width > 2, items=[1, 2, 3, 4, 5]) == [2, 3, 4]
    # Expressions are matched with paths all the same.
    assert chosen("head", items=[1, 2, 3, 4, 5]) == [4]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            "mlp",
            r"wrt 'mlp' matches no part \(an expression must match a whole path\); there are 0",
        ),
        ("layers.[", "not a regular expression"),
        (5, "no part 5; there are 0: embed, 1: layers.0.mlp"),
        (-6, "no part -6"),
        (True, "no part True"),
        ([0, 5], "no part 5"),
        ([0.5], "no part 0.5"),
        (0.5, "no part 0.5"),
        (["head"], "no part 'head'"),
        (slice(5, None), r"wrt slice\(5, None, None\) matches no part; there are 0: embed"),
        ([], r"wrt \[\] matches no part; there are"),
        (lambda path: False, "wrt matches no part; there are"),
    ],
)
def test_what_cannot_be_chosen(selection, message):
    with unchecked(), pytest.raises(InputError, match=message):
        chosen(selection)


def test_nothing_to_choose_from():
    with pytest.raises(InputError, match="wrt: the model has no part"):
        chosen(None, [])


def test_long_lists_are_cut_and_the_model_itself_has_a_name():
    with pytest.raises(InputError, match=r"0: \(the model\), 1: 1, .*, 39: 39, \.\.\.$"):
        chosen(41, ["", *map(str, range(1, 41))])
    with pytest.raises(InputError, match=r"39: 39$"):
        chosen(40, ["", *map(str, range(1, 40))])
