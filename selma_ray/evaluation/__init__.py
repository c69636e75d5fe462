"""Stage: base, experts and merged model on the same prompts and seeds, with intervals and paired differences."""
