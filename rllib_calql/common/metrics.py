"""Every metric key of the package, one comment each.

Keys below `LEARNER` keys appear under `learners/default_policy/`; `EVALUATION` keys appear under `env_runners/` and
`evaluation/env_runners/`; the rest stands at the top level of a result. This module imports nothing, so that loggers,
the command line and tests can use the names without loading Ray.
"""

# Top level
PHASE = "phase"  # "offline" or "online": the phase that the gradient updates of this result belong to.
NUM_OFFLINE_UPDATES_LIFETIME = "num_offline_updates_lifetime"  # Gradient updates of the offline phase so far.
NUM_ONLINE_UPDATES_LIFETIME = "num_online_updates_lifetime"  # Gradient updates of the online phase so far.
NUM_ONLINE_ENV_STEPS_LIFETIME = "num_online_env_steps_lifetime"  # Env steps of finished episodes stored so far.
NUM_ONLINE_EPISODES_LIFETIME = "num_online_episodes_lifetime"  # Finished episodes stored so far.
NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME = "num_online_env_steps_taken_lifetime"  # Those stored, unfinished and lost ones.
UPDATES_PER_S = "updates_per_s"  # Gradient updates per second of this result's training steps, sampling included.

Q_OUT_OF_RANGE = "q_out_of_range"  # How far mean Q lies outside the possible returns, see `DivergenceWatch`.
Q_WARNING = "q_warning"  # What `DivergenceWatch` warned of in this phase; absent if of nothing.

OVERFITTING = "overfitting"  # What `OverfittingWatch` warned of; absent if of nothing.

OFFLINE = "offline"  # Value of `PHASE` during pre-training.
ONLINE = "online"  # Value of `PHASE` during fine-tuning.

# Below "fine_tuning" (from the switch on, once an evaluation exists)
FINE_TUNING = "fine_tuning"  # Parent key of those below.
DIP = "dip"  # Worst evaluation return since the switch minus the evaluation at the switch (at most 0).
REGRET = "regret"  # Mean over the evaluations since the switch of 1 - score, see `EvaluationHistory`.
REGIME = "regime"  # What was better at the switch, "policy", "data" or "both", see `regime_of`; absent if not known.
REGIME_QUANTITY = "regime_quantity"  # What they were compared by, "return" or "success rate".
REGIME_POLICY = "regime_policy"  # That of the policy: the last evaluation before the switch.
REGIME_DATA = "regime_data"  # That of the offline data's episodes.

# Below "store"
STORE = "store"  # Parent key of the sizes below.
NUM_OFFLINE_TRANSITIONS = "num_offline_transitions"  # Rows of offline data held, held-out ones included.
NUM_HELD_OUT_TRANSITIONS = "num_held_out_transitions"  # Those of held-out episodes; absent without a hold-out.
OFFLINE_RETURN_MEAN = "offline_return_mean"  # Mean undiscounted return of the offline episodes, recorded rewards.
NUM_ONLINE_TRANSITIONS = "num_online_transitions"  # Rows of online data held (at most `online_capacity`).

# Below "collection"
COLLECTION = "collection"  # Parent key of how collection and updates keep pace.
NUM_ENV_STEPS_BEHIND = "num_env_steps_behind"  # Env steps stored whose updates are still to be made.
LEARNER_BUSY_SHARE = "learner_busy_share"  # Share of the iteration's time that went into updates (`sample_async`).
NUM_DISCARDED_EPISODES_LIFETIME = "num_discarded_episodes_lifetime"  # Episodes with NaN or infinity, not stored.
NUM_INTERVENTION_ENV_STEPS_LIFETIME = "num_intervention_env_steps_lifetime"  # Those stored that a person acted in.
NUM_REPLACED_ACTIONS_LIFETIME = (
    "num_replaced_actions_lifetime"  # Those in which another action was executed than asked.
)
INTERVENTION_SHARE = "intervention_share"  # Share of the env steps stored so far that a person acted in.
NUM_HEALTHY_ENV_RUNNERS = "num_healthy_env_runners"  # Remote env runners that are not lost.
NUM_CLIENTS = "num_clients"  # Clients that are connected; only with `external_port`.
NUM_ENV_RUNNER_FAILURES_LIFETIME = "num_env_runner_failures_lifetime"  # How often one died, hung or raised.

# Below "evaluation/fqe" (with `offline_evaluation_type="fqe"`), in discounted environment rewards
FQE = "fqe"  # Parent key of those below.
VALUE = "value"  # Fitted value of the policy at the held-out episodes' first observations, mean over episodes.
VALUE_LOW = "value_low"  # Lower end of its 95 % interval.
VALUE_HIGH = "value_high"  # Upper end of its 95 % interval.
BEHAVIOUR_RETURN = "behaviour_return"  # Mean discounted return of these episodes as they were recorded.
FQE_TD_ERROR = "td_error"  # Root of the mean squared TD error of the fitted values, held-out rows.
FQE_TD_ERROR_TRAINING = "td_error_training"  # The same on as many rows of the fit.
SHARE_OFF_DATA = "share_off_data"  # Share of held-out states in which the policy leaves the data.
FQE_WARNINGS = "warnings"  # What makes the value doubtful, one finding a line; absent if nothing does.

OFFLINE_DATA = "offline_data"  # One line about the offline data: sizes, ends, returns, what was decided about them.
OFFLINE_DATA_WARNINGS = "offline_data_warnings"  # What looks wrong in the offline data, one finding a line; or absent.

SUCCESS_WARNING = "success_warning"  # That no episode shows `success_key`; absent if one does, or it is not set.
PRETRAINED_WARNING = "pretrained_warning"  # Which offline updates `pretrained` has brought; absent if it says nothing.

# Below "env_runners" and "evaluation/env_runners"
EPISODE_RETURN_STD = "episode_return_std"  # Standard deviation of the returns in RLlib's `episode_return_mean`.
SUCCESS_RATE = "success_rate"  # Mean success of the episodes whose infos say, see `success_key` and `success_rule`.
NORMALIZED_SCORE = "normalized_score"  # 100 * (return - ref_min) / (ref_max - ref_min), if the data set has scores.

# Below "evaluation/held_out", where episodes are held out; means over their rows
HELD_OUT = "held_out"  # Parent key of those below.
TD_LOSS = "td_loss"  # Squared TD error, mean over critics.
TD_LOSS_TRAINING = "td_loss_training"  # The same on as many rows that training draws.
GAP = "gap"  # Clipped gap of the conservative term, mean over critics; absent where the term is off.
Q_DATA = "q_data"  # Q of the data's actions, mean over critics.
ACTION_DISTANCE = "action_distance"  # Squared distance of the greedy action to the data's, module action units.
# Also `CALIBRATION_GAP`, `REFERENCE_LOSS`, and `LOG_PROB`, here of the data's actions.

# Below "learners/default_policy"; means over the update call's gradient steps
QF_LOSS = "qf_loss"  # Critic loss, conservative term included, summed over critics.
POLICY_LOSS = "policy_loss"  # Actor loss (behaviour cloning loss during `bc_updates`).
ALPHA_LOSS = "alpha_loss"  # Loss of the entropy temperature.
ALPHA_VALUE = "alpha_value"  # Entropy temperature alpha.
ALPHA_PRIME = "alpha_prime"  # Lagrange multiplier (only with `lagrangian`).
ALPHA_PRIME_LOSS = "alpha_prime_loss"  # Loss of the Lagrange multiplier (only with `lagrangian`).
CQL_LOSS = "cql_loss"  # Weighted conservative term (multiplier included), summed over critics.
LOG_PROB = "log_prob"  # Mean log pi(a|s) of freshly sampled actions, module action units.
TARGET_Q = "target_q"  # Mean TD target.
CALIBRATION_GAP = "calibration_gap"  # mean(Q(s, a) - G) on the batch's own actions, mean over critics.
CALIBRATION_GAP_OFFLINE = "calibration_gap_offline"  # The same, offline rows only.
CALIBRATION_GAP_ONLINE = "calibration_gap_online"  # The same, online rows only (online phase).
CLIPPED_OFFLINE = "clipped_observations_offline"  # Share of the numbers of offline rows that `observation_clip` clips.
CLIPPED_ONLINE = "clipped_observations_online"  # The same, online rows only (online phase).
REFERENCE_VALUE_MEAN = "reference_value_mean"  # Mean of the reference value V over the rows that it bounds.
REFERENCE_LOSS = "reference_loss"  # Mean squared error of a learned V on the rows that it is fitted to.
REFERENCE_GAP = "reference_gap"  # mean(V(s) - G) over these rows.
NUM_REFERENCE_UPDATES_LIFETIME = "num_reference_updates_lifetime"  # Updates of the fit of V before all other updates.
NUM_UPDATES_LIFETIME = "num_updates_lifetime"  # Gradient updates this learner has made, skipped ones included.
NUM_SKIPPED_UPDATES_LIFETIME = "num_skipped_updates_lifetime"  # Those that changed nothing, see `SkippedUpdates`.
NUM_SKIPPED_UPDATES_IN_A_ROW = "num_skipped_updates_in_a_row"  # Skipped updates since the last one that was not.

# Per critic c = 1, 2, ...; `format(c=...)` gives the key.
TD_LOSS_OF_CRITIC = "td_loss_q{c}"  # Mean squared TD error.
GAP_OF_CRITIC = "cql_gap_q{c}"  # Mean clipped gap: log-sum-exp minus Q of the data action.
Q_DATA_OF_CRITIC = "q{c}_data"  # Mean Q of the data actions.
Q_UNIFORM_OF_CRITIC = "cql_q{c}_rand"  # Mean Q of the uniform actions.
Q_CURRENT_OF_CRITIC = "cql_q{c}_current_actions"  # Mean Q of the current actions, before calibration.
Q_NEXT_OF_CRITIC = "cql_q{c}_next_actions"  # Mean Q of the next-state actions, before calibration.
Q_STD_OF_CRITIC = (
    "cql_std_q{c}"  # Spread (population std) of Q over all sampled actions of a state, mean over the batch.
)
BOUND_RATE_CURRENT_OF_CRITIC = "bound_rate_cql_q{c}_current_actions"  # Share of current actions lifted to V.
BOUND_RATE_NEXT_OF_CRITIC = "bound_rate_cql_q{c}_next_actions"  # Share of next-state actions lifted to V.
BOUND_RATE_UNIFORM_OF_CRITIC = "bound_rate_cql_q{c}_rand"  # Share of uniform actions lifted to V, if these are.
CALIBRATION_PENALTY_OF_CRITIC = "calibration_penalty_q{c}"  # Mean penalty of the other form of calibration.
