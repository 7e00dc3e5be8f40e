"""The command line: parse, call one function, save one artefact, print one line. The only room that prints.

Import `main` from main; a verb is added there, its function in one of the other files."""
