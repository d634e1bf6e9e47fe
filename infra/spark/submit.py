"""spark-submit's entry: runs `sid ...` by module name, so that the packages of the image are imported, not this folder.

spark-submit --master spark://host:7077 --jars "$(python -m jobs.spark.engine)" \\
    infra/spark/submit.py encode --config infra/conf/cluster.toml

`python -m jobs.spark.engine` prints the Delta jars of the environment: a JVM that runs already takes none. The master
is spark-submit's.
"""

import runpy

runpy.run_module("pipelines", run_name="__main__", alter_sys=True)
