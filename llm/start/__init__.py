"""Start a run, new or resumed: check the request, open the text, build the parts, open the folder."""
