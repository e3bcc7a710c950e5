"""Shows the progress of long work; shared with `ntk`."""

from ntk.progress import Advance as Advance
from ntk.progress import progress_shown as progress_shown
from ntk.progress import show_progress as show_progress
from ntk.progress import show_stage as show_stage
