"""The adapters by name: tasks of other systems, and what the policy acts in."""

from collections.abc import Callable, Mapping

from k25_train.environments.adapters.gymnasium import GymnasiumEnvironment, GymnasiumTasks
from k25_train.environments.adapters.harbor import HarborEnvironment, HarborTasks
from k25_train.environments.adapters.nemo_gym import NemoGymEnvironment, NemoGymTasks
from k25_train.environments.adapters.openenv import OpenEnvEnvironment, OpenEnvTasks
from k25_train.environments.adapters.verifiers import VerifiersEnvironment, VerifiersTasks
from k25_train.environments.environment import MakeEnvironment
from k25_train.environments.family import Tasks

ADAPTERS: dict[str, Callable[[Mapping[str, str]], Tasks]] = {
    GymnasiumTasks.name: GymnasiumTasks,
    HarborTasks.name: HarborTasks,
    NemoGymTasks.name: NemoGymTasks,
    OpenEnvTasks.name: OpenEnvTasks,
    VerifiersTasks.name: VerifiersTasks,
}
"""`family` in the configuration -> what makes its tasks from its options."""
ADAPTED: dict[str, MakeEnvironment] = {
    GymnasiumTasks.name: GymnasiumEnvironment,
    HarborTasks.name: HarborEnvironment,
    NemoGymTasks.name: NemoGymEnvironment,
    OpenEnvTasks.name: OpenEnvEnvironment,
    VerifiersTasks.name: VerifiersEnvironment,
}
"""`Task.environment` -> what makes it."""
