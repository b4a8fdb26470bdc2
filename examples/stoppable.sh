# Sourced by the scripts that run for long: Ctrl-C or SIGTERM ends what they have started, too.
#
# Bash acts on a signal only when the command in the foreground has ended. So commands run in the
# background, each in a process group of its own (set -m), which can be ended as a whole.
set -m
end_groups() {
    local group
    for group in $(jobs -p); do kill -- "-$group" 2> /dev/null || true; done
    { wait; } 2> /dev/null # where bash reports each as terminated
}
trap end_groups EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# stoppable COMMAND...: run it, and wait until it has ended, also when stopped: training saves first.
on_stop='wait; exit 143'
stoppable() {
    { trap "$on_stop" TERM; "$@"; } < /dev/null &
    wait $!
}
