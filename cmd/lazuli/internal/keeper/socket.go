package keeper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// listen listens on a Unix socket at path, for root only, in a folder that others can pass but not list. The file of a
// process that is gone is replaced; that of one that listens is an error.
func listen(path string, kind int) (fd int, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return -1, err
	}
	// Between bind and listen a socket looks like a dead one's.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return -1, err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return -1, fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	if err := clear(path, kind); err != nil {
		return -1, err
	}
	fd, err = unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err == nil {
		err = os.Chmod(path, 0o600) // nobody can connect yet
	}
	const backlog = 4096 // the kernel's net.core.somaxconn: clients wait here for the next server
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("listen on %s: %w", path, err)
	}
	return fd, nil
}

// lingering is how long a process may go on to listen that is about to be gone.
var lingering = time.Second

// clear makes room for a socket at path.
func clear(path string, kind int) error {
	// The server of a keeper that was killed may live for a moment longer.
	for end := time.Now().Add(lingering); ; time.Sleep(10 * time.Millisecond) {
		err := dial(path, kind)
		switch {
		case errors.Is(err, unix.ENOENT):
			return nil
		case errors.Is(err, unix.ECONNREFUSED):
			if fi, err := os.Lstat(path); err != nil || fi.Mode().Type() != fs.ModeSocket {
				return fmt.Errorf("%s is there and not a socket: remove it, or choose another path", path)
			}
			return os.Remove(path)
		case len(path) >= len(unix.RawSockaddrUnix{}.Path):
			return fmt.Errorf("listen on %s: a socket's path may have %d bytes, this one has %d: choose a shorter one",
				path, len(unix.RawSockaddrUnix{}.Path)-1, len(path))
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EINVAL):
			return fmt.Errorf("listen on %s: %w", path, err)
		}
		if time.Now().After(end) {
			return fmt.Errorf("a daemon runs already, or another process that listens on %s already: stop it, or choose another path", path)
		}
	}
}

// dial returns what becomes of an attempt to connect; nil, EAGAIN and EPROTOTYPE say that somebody listens.
func dial(path string, kind int) error {
	fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

// listens reports whether fd is the socket at path.
func listens(fd int, path string) bool {
	name, err := unix.Getsockname(fd)
	if err != nil {
		return false
	}
	unixName, ok := name.(*unix.SockaddrUnix)
	fi, err := os.Lstat(path)
	return ok && unixName.Name == path && err == nil && fi.Mode().Type() == fs.ModeSocket
}
