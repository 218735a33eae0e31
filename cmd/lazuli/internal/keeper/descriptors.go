package keeper

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// variable is the environment's list of the descriptors that a process was given: "init=4:fuse=3".
const variable = "LAZULI_FDS"

// A descriptor is one that has a name.
type descriptor struct {
	name string
	fd   int
}

type descriptors []descriptor

// sorted returns what is held, in the order of names.
func sorted(held map[string]int) descriptors {
	var all descriptors
	for name, fd := range held {
		all = append(all, descriptor{name, fd})
	}
	slices.SortFunc(all, func(a, b descriptor) int { return cmp.Compare(a.name, b.name) })
	return all
}

// String returns the value of variable.
func (all descriptors) String() string {
	var s []string
	for _, d := range all {
		s = append(s, fmt.Sprintf("%s=%d", d.name, d.fd))
	}
	return strings.Join(s, ":")
}

// inherited returns the descriptors that this process was given, by a keeper or by systemd, and takes the variables that
// say so out of the environment, and the descriptors out of sight of further children.
func inherited() (map[string]int, error) {
	all, err := listed(os.Getenv(variable))
	if err != nil {
		return nil, err
	}
	if pid, _ := strconv.Atoi(os.Getenv("LISTEN_PID")); pid == os.Getpid() && all == nil {
		const first = 3 // SD_LISTEN_FDS_START
		n, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
		names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
		for i := range n {
			d := descriptor{fd: first + i}
			if i < len(names) {
				d.name = names[i]
			}
			all = append(all, d)
		}
	}
	for _, name := range []string{variable, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		os.Unsetenv(name)
	}
	held := map[string]int{}
	for _, d := range all {
		if err := setCloexec(d.fd, true); err != nil {
			return nil, fmt.Errorf("the descriptor %q that this process was given, %d, is not open: %w", d.name, d.fd, err)
		}
		if _, ok := held[d.name]; ok { // a socket unit's, and the same one in the store
			unix.Close(d.fd)
			continue
		}
		held[d.name] = d.fd
	}
	return held, nil
}

// listed parses the value of variable.
func listed(value string) (descriptors, error) {
	if value == "" {
		return nil, nil
	}
	var all descriptors
	for s := range strings.SplitSeq(value, ":") {
		name, number, _ := strings.Cut(s, "=")
		fd, err := strconv.Atoi(number)
		if err != nil {
			return nil, fmt.Errorf("%s in the environment: %q is not NAME=DESCRIPTOR: unset it", variable, s)
		}
		all = append(all, descriptor{name, fd})
	}
	return all, nil
}

func setCloexec(fd int, on bool) error {
	flags := 0
	if on {
		flags = unix.FD_CLOEXEC
	}
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, flags)
	return err
}

// connected reports whether the kernel's side of a FUSE connection is there. It ends with the last file system that
// needs the mount, wherever that is mounted.
func connected(fuse int) bool {
	wait := []unix.PollFd{{Fd: int32(fuse)}} // POLLERR is always asked for
	for {
		_, err := unix.Poll(wait, 0)
		if err != unix.EINTR {
			return err == nil && wait[0].Revents&(unix.POLLERR|unix.POLLNVAL) == 0
		}
	}
}

// environ is the environment of a child that is given descriptors. Nothing in it is about this process's own relation to systemd, which
// would be taken for the child's: runc passes NOTIFY_SOCKET into its container.
func environ(given descriptors) []string {
	own := []string{"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "FDSTORE"}
	return append(slices.DeleteFunc(os.Environ(), func(s string) bool {
		name, _, _ := strings.Cut(s, "=")
		return slices.Contains(own, name)
	}), variable+"="+given.String())
}
