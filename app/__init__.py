"""The HTTP front end: validate, template, tokenise, admit, stream out. Never imports torch."""
