"""Answers of SLURM and munge that mean trouble which passes: whoever asked waits and asks again.

Any other answer is a refusal, and waiting would not change it. An expired or foreign credential counts as
passing since clocks are set and keys are replaced while jobs run; how long is waited is up to whoever asks.
"""

PASSING = (
    # SLURM, src/common/slurm_errno.c, releases 16.05 to 26.11: the controller cannot be reached.
    "Unable to contact slurm controller",  # SLURMCTLD_COMMUNICATIONS_*_ERROR
    "Communication connection failure",  # SLURM_COMMUNICATIONS_CONNECTION_ERROR
    "Communication shutdown failure",  # SLURM_COMMUNICATIONS_SHUTDOWN_ERROR
    "Message send failure",  # SLURM_COMMUNICATIONS_SEND_ERROR
    "Message receive failure",  # SLURM_COMMUNICATIONS_RECEIVE_ERROR
    "Unexpected missing socket error",  # SLURM_COMMUNICATIONS_MISSING_SOCKET_ERROR
    "Connection rejected by handler",  # SLURM_COMMUNICATIONS_REJECTED
    "forced closed by quiesce timeout",  # SLURM_COMMUNICATIONS_QUIESCE_TIMEOUT
    "Kernel reported delayed socket error",  # SLURM_COMMUNICATIONS_DELAYED_ERROR
    "Read would block",  # SLURM_BLOCKED_ON_READ
    "Write would block",  # SLURM_BLOCKED_ON_WRITE
    "Process is shutting down",  # SLURM_SHUTTING_DOWN
    "Zero Bytes were transmitted or received",  # SLURM_PROTOCOL_SOCKET_ZERO_BYTES_SENT
    "Header lengths are longer than data received",  # ESLURM_PROTOCOL_INCOMPLETE_PACKET
    "timed out",  # SLURM_PROTOCOL_SOCKET_IMPL_TIMEOUT, SLURM_COMMUNICATIONS_*_TIMEOUT; ETIMEDOUT
    # The controller answers, but another one is in charge, or it is busy, starting or full.
    "controller in standby mode",  # ESLURM_IN_STANDBY_MODE
    "Controller is in standby mode",  # ESLURM_IN_STANDBY_USE_BACKUP
    "Rate limit exceeded",  # SLURMCTLD_COMMUNICATIONS_BACKOFF, _HARD_DROP
    "step creation delayed",  # EAGAIN of a step, until 22.05
    "Requested nodes are busy",  # ESLURM_NODES_BUSY
    "Required ports are in use",  # ESLURM_PORTS_BUSY
    "PrologSlurmctld is still running",  # ESLURM_PROLOG_RUNNING
    "MaxJobCount limit reached",  # ESLURM_MAX_JOB_COUNT
    "I/O error writing script/environment to file",  # ESLURM_WRITING_TO_FILE
    "Unable to create job record",  # ESLURM_ERROR_ON_DESC_TO_RECORD_COPY
    # The job is between two states: it ends, is requeued, or is being written to the accounting database.
    "Job can not be altered now",  # ESLURM_TRANSITION_STATE_NO_UPDATE
    "transitional state",  # src/scancel/scancel.c
    "Job/step already completing",  # ESLURM_ALREADY_DONE
    "Duplicate job id",  # ESLURM_DUPLICATE_JOB_ID
    "Job update not available right now",  # ESLURM_JOB_SETTING_DB_INX, until 23.11
    "Job locked by another sibling",  # ESLURM_FED_JOB_LOCK
    "Unable to connect to database",  # ESLURM_DB_CONNECTION
    "Database connection reference is invalid",  # ESLURM_DB_CONNECTION_INVALID
    # Credentials, of SLURM's own plugins and as munge's come back from the controller.
    "Protocol authentication error",  # SLURM_PROTOCOL_AUTHENTICATION_ERROR
    "authentication credential",  # ESLURM_AUTH_CRED_INVALID ("Invalid …"), ESLURM_AUTH_EXPIRED
    "Authentication credential",
    "Unable to query kernel for socket peer credential",  # ESLURM_AUTH_SOCKET_INVALID_PEER
    "Token Generation failed",  # ESLURM_AUTH_UNABLE_TO_GENERATE_TOKEN
    "Error generating job credential",  # ESLURM_INVALID_JOB_CREDENTIAL
    "Job credential expired",  # ESLURMD_CREDENTIAL_EXPIRED
    "Job credential replayed",  # ESLURMD_CREDENTIAL_REPLAYED
    "failed to connect to any sack sockets",  # src/common/sack_api.c
    # SLURM, src/plugins/auth/munge/auth_munge.c.
    "Munge encode failed",
    "Munge decode failed",
    "If munged is up, restart",
    "Check for out of sync clocks",
    # munge, src/libmunge/strerror.c and m_msg_client.c.
    "Socket communication error",  # EMUNGE_SOCKET
    "Socket timeout",  # EMUNGE_TIMEOUT
    "Expired credential",  # EMUNGE_CRED_EXPIRED
    "Rewound credential",  # EMUNGE_CRED_REWOUND
    "Replayed credential",  # EMUNGE_CRED_REPLAYED
    "Did you start munged?",
    # A cluster whose commands get their configuration from the controller: src/common/read_config.c.
    "failed to fetch config",
    "Could not establish a configuration source",
    # SLURM, src/sbatch/sbatch.c and src/srun/libsrun: what they wait for themselves, though not forever.
    "temporarily unable to accept job",
    "Slurm job queue full",
    "Job creation temporarily disabled",
    "step creation temporarily disabled",
    "step creation still disabled",
    # The C library (strerror and gai_strerror), which SLURM passes on.
    "Connection refused",  # ECONNREFUSED
    "Connection reset by peer",  # ECONNRESET
    "Software caused connection abort",  # ECONNABORTED
    "Broken pipe",  # EPIPE
    "Transport endpoint is not connected",  # ENOTCONN
    "Cannot send after transport endpoint shutdown",  # ESHUTDOWN
    "No route to host",  # EHOSTUNREACH
    "Host is down",  # EHOSTDOWN
    "Network is unreachable",  # ENETUNREACH
    "Network is down",  # ENETDOWN
    "Resource temporarily unavailable",  # EAGAIN
    "Interrupted system call",  # EINTR
    "Too many open files in system",  # ENFILE
    "Stale file handle",  # ESTALE: SLURM's files on a network file system
    "Temporary failure in name resolution",  # EAI_AGAIN
    # What versions to come, and a site's plugins, say in their own words.
    "try again",
    "retry later",
    "retry momentarily",
)  # fmt: skip
"""Parts of such answers, in any case of letters; behind each, which answer it is, or its file above."""


def passes(answer: str) -> bool:
    """Whether an answer means trouble that passes by itself."""
    folded = answer.casefold()
    return any(words.casefold() in folded for words in PASSING)
