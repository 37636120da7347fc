"""The calls of other libraries, said in this one's: a translation each, and no mathematics."""
