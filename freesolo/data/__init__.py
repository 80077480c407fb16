"""Photos in, shards and labels out: everything that knows how data is stored, none of what is computed from it."""
