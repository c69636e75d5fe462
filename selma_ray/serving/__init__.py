"""Stage: the merged model answers HTTP requests, next to a batched evaluator."""
