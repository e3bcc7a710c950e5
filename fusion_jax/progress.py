"""Shows the progress of long work; shared with `ntk`."""

from ntk.progress import Advance as Advance
from ntk.progress import show_progress as show_progress
