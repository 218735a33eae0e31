package keeper

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// notify is sd_notify(3): it sends lines of NAME=VALUE, and descriptors, to the socket at address. "@" at its beginning stands for the
// abstract namespace.
func notify(address, state string, fds ...int) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// systemd may be busy with itself, but not for ever.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(fd, []byte(state), rights, &unix.SockaddrUnix{Name: address}, 0)
		if err != unix.EINTR {
			return err
		}
	}
}

// reloading is what systemd wants to hear before the service is not itself for a while. READY=1 ends it.
func reloading() string {
	var now unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/1000)
}
