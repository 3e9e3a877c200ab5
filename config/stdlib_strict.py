"""config/stdlib.py with the control as its dense parent: config/stdlib_control.py, the parent trained on for
as long as its child.
"""

base = 'config/stdlib.py'

init_from = 'config/stdlib_control.py'
# 20 times that of config/stdlib.py. Lambda is at its cap for most of the run, so the cap is what a nat is
# worth in edges.
# In the steps that the control had, 0.8 was too little
lambda_max = 4.0
