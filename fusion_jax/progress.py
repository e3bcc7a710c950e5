"""Progress of long work, as in ntk."""

from ntk.progress import Advance as Advance
from ntk.progress import show_progress as show_progress
