"""`interceptctl report`: a recording as a page to look at, or as a trace for ui.perfetto.dev."""
