"""Ways of training against each other: what each changes, what must be the same, and what is measured.

``modes``       what differs between them, and on which devices who runs
``windows``     a run cut into measured windows at the ends of its steps
``measure``     one mode in numbers
``contract``    whether the comparison is fair, said sentence by sentence
``compare``     all modes against each other and against the ideal
``intervals``   confidence intervals, and whether two samples come from one distribution
``page``        all of it as HTML
"""
