"""Reports of runs: tables and figures, made from the files of run directories alone.

reading    a run, read from its directory; everything below starts from it
units      bytes, durations and curves as text
tables     the tables of a report, and their Markdown
figures    loss, blocks and clients as Plotly figures
gantt      the timeline as a Plotly figure
timeline   the timeline as text, for a terminal
curves     the SVG of a comparison
html       the page with all of them
write      `report.html` and `report.md` on disk
"""
