"""Questions about prompts, written by a language model: DSG's three calls and TIFA's one."""
