"""spark-submit's entry: runs `sid ...` by module name, so that the packages of the image are imported, not this folder.

spark-submit --master spark://host:7077 infra/spark/submit.py encode --config infra/conf/cluster.toml
"""

import runpy

runpy.run_module("pipelines", run_name="__main__", alter_sys=True)
