package bundle

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"
	"time"
)

// Listening returns true when something listens on a TCP port in the network namespace of a process, which is looked up every 10 ms, or false
// when ctx ends or the process has ended before.
func Listening(ctx context.Context, pid, port int) bool {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		gone := true
		for _, family := range []string{"tcp", "tcp6"} {
			f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, family))
			if err != nil { // or a kernel without IPv6
				continue
			}
			gone = false
			found := listens(bufio.NewScanner(f), port)
			f.Close()
			if found {
				return true
			}
		}
		if gone {
			return false
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}

// listens looks for the port in the lines of /proc/PID/net/tcp (proc_pid_net(5)): number, local and remote address, state.
func listens(lines *bufio.Scanner, port int) bool {
	const listen = "0A" // TCP_LISTEN, include/net/tcp_states.h
	suffix := fmt.Sprintf(":%04X", port)
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) > 3 && f[3] == listen && strings.HasSuffix(f[1], suffix) {
			return true
		}
	}
	return false
}
