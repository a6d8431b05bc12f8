"""Exit codes of this project's programs beside 0 (done) and 1 (something broke)."""

EXIT_MISTAKE = 2
"""The user can mend it; one line on standard error says how."""
EXIT_REQUEUE = 85
"""Training was asked to stop, and saved its state: the same command continues."""
