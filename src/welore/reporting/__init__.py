"""From artefacts and records to tables, figures and one HTML page (the verb `report`); needs no torch.

Import `page.report` to make a page, `discover.Section` to add a part to it, and the functions of `figures`,
`training_figures` and `tables` for one figure or table.
"""
