"""Errors that users can mend: one class for both packages, so that one ``except`` catches all."""

from ntk.errors import InputError as InputError
from ntk.errors import nearest as nearest
