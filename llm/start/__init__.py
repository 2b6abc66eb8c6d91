"""Start a run, new, resumed or forked: check the request, open the text, build the parts, open the folder."""
