"""Model families: one module each with the nine names the rest of fastpref uses."""
