"""Arrays, whatever they hold: their dtypes, shardings, random bits, ranks and loops."""
