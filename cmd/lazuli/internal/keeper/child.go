package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A Child is the server's side of its keeper. Its methods may be called side by side.
type Child struct {
	mu   sync.Mutex // held over a message and its answer
	conn *net.UnixConn
	held map[string]int
	init []byte
	lock *os.File // on "init", as long as this process lives
}

// Inherit returns what a keeper gave to this process, or an error if none started it. It is called once, before the process starts
// children, which would have the descriptors else. If another process serves the connection still, Inherit waits for its end.
func Inherit() (*Child, error) {
	c, err := inherit()
	if err != nil {
		return nil, err
	}
	fd, ok := c.held[initName]
	if !ok {
		return c, nil
	}
	if c.lock, err = lock(fd); err != nil {
		return nil, fmt.Errorf("the kernel's INIT: %w", err)
	}
	if c.init, err = io.ReadAll(io.NewSectionReader(c.lock, 0, 1<<20)); err != nil {
		return nil, fmt.Errorf("the kernel's INIT: %w", err)
	}
	unix.Close(fd)
	delete(c.held, initName)
	return c, nil
}

// inherit is Inherit for whom does not serve.
func inherit() (*Child, error) {
	held, err := inherited()
	if err != nil {
		return nil, err
	}
	fd, ok := held[keeperName]
	if !ok {
		return nil, errors.New("no keeper started this process: start one, lazuli daemon")
	}
	delete(held, keeperName)
	conn, err := connOf(fd)
	if err != nil {
		return nil, err
	}
	return &Child{conn: conn, held: held}, nil
}

// lock makes this process the one that serves the connection whose INIT is in the memfd.
//
// A lock of flock(2) belongs to an open file, and that of the memfd is everybody's, so this opens another one. It is
// closed when the last thread of this process is out of the kernel, and cannot have taken a request any more.
func lock(memfd int) (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", memfd))
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err == nil {
			return f, nil
		}
		if err != unix.EINTR {
			f.Close()
			return nil, err
		}
	}
}

// FUSE returns the connection of the mount that the last server served, and the kernel's first request on it, for
// serve.Resume. The descriptor is the caller's; the keeper has its own. It is not ok if there is none, or it was taken already: then the
// server mounts, and calls [Child.Keep].
func (c *Child) FUSE() (fd int, init []byte, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fd, ok = c.held[fuseName]
	if !ok || c.init == nil {
		return -1, nil, false
	}
	delete(c.held, fuseName)
	return fd, bytes.Clone(c.init), true
}

// Listener returns the listening socket of that name in the keeper's Options.Sockets. Closing it leaves the socket's file, and connections
// wait for the next server.
func (c *Child) Listener(name string) (net.Listener, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fd, ok := c.held[name]
	if !ok {
		return nil, fmt.Errorf("the keeper has no socket %q for this process, or it was taken already", name)
	}
	delete(c.held, name)
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("socket %q: %w", name, err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return l, nil
}

// Keep gives the keeper the connection of a mount that was made just now (serve.Server.File), and the kernel's first
// request on it (serve.Server.Init), instead of what it keeps. fuse stays the caller's.
// When Keep returns nil, this process may die and nobody notices.
func (c *Child) Keep(fuse *os.File, init []byte) error {
	fd, err := memfd(init)
	if err != nil {
		return fmt.Errorf("keep the FUSE connection: memfd: %w", err)
	}
	defer unix.Close(fd)
	l, err := lock(fd)
	if err != nil {
		return fmt.Errorf("keep the FUSE connection: %w", err)
	}
	conn, err := fuse.SyscallConn() // unlike Fd it changes nothing
	if err != nil {
		l.Close()
		return err
	}
	err2 := conn.Control(func(fuse uintptr) { err = c.say("keep", int(fuse), fd) })
	if err := errors.Join(err, err2); err != nil {
		l.Close()
		return fmt.Errorf("keep the FUSE connection: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lock != nil {
		c.lock.Close()
	}
	c.lock = l
	return nil
}

// memfd returns a file in memory that has the content b for ever.
func memfd(b []byte) (fd int, err error) {
	fd, err = unix.MemfdCreate("lazuli-init", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if err != nil {
		return -1, err
	}
	if _, err = unix.Write(fd, b); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Ready says that the server does its work. systemd learns it before Ready returns.
func (c *Child) Ready() error { return c.say("ready") }

// Status gives systemd a line for people to read, which holds until the next one or the server's end.
func (c *Child) Status(text string) error {
	const most = 1000 // bytes
	if len(text) > most {
		text = text[:most]
	}
	return c.say("status " + strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, text))
}

// say sends a message and waits for the answer.
func (c *Child) say(text string, fds ...int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := send(c.conn, text, fds...); err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	m, err := receive(c.conn)
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	if m.text != ok {
		return fmt.Errorf("keeper: %s", m.text)
	}
	return nil
}
