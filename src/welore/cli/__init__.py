"""The command line: parse, call one function, save one artefact, print one line. The only room that prints."""
