"""The error for unusable input: one class for both packages, so that one ``except`` catches it."""

from ntk.errors import InputError as InputError
from ntk.errors import check_at_least as check_at_least
from ntk.errors import nearest as nearest
