"""One self-contained page about finished runs, with its charts as SVG and as PNG files."""
