"""A cluster that is not there: the real admission and queue code on a virtual clock, with given rates.

``scenario``    what is simulated: rates, lengths, devices, failures
``draws``       lengths and delays, drawn from seeds
``engine``      an engine: requests that share its steps
``cluster``     actors, learner and publisher around the queue, as events in virtual time
``outcome``     what came of it
``plan``        which split of a cluster is fastest
"""
