package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A holder waits that long for thanks, and a keeper for a holder, which somebody else may keep waiting.
const (
	thanksTimeout   = 5 * time.Second
	handoverTimeout = 2 * thanksTimeout
)

// Hold is the holder: it holds what its keeper gave to it, until the next keeper has come and taken it, or the mount is gone, or ctx ends.
// It lets go of the standard streams and the working directory.
func Hold(ctx context.Context) error {
	c, err := inherit()
	if err != nil {
		return err
	}
	l, err := c.Listener(holderName)
	if err != nil {
		return err
	}
	listener := l.(*net.UnixListener)
	listener.SetUnlinkOnClose(true)
	defer listener.Close()
	fuse, ok := c.held[fuseName]
	init, ok2 := c.held[initName]
	if !ok || !ok2 {
		return errors.New("the keeper gave this process nothing to hold")
	}

	woken, wake, err := os.Pipe()
	if err != nil {
		return err
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		defer listener.Close()
		for wait := []unix.PollFd{{Fd: int32(fuse)}, {Fd: int32(woken.Fd())}}; ; {
			if _, err := unix.Poll(wait, -1); err != unix.EINTR {
				return
			}
		}
	}()
	defer woken.Close()
	defer func() { <-gone }()
	defer wake.Close()
	defer context.AfterFunc(ctx, func() { listener.Close() })()

	if err := c.Ready(); err != nil {
		return err
	}
	if err := letGo(); err != nil {
		return err
	}
	for {
		conn, err := listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		if give(conn, fuse, init) {
			listener.Close() // and the file is gone before the other side sees the end
			return conn.Close()
		}
		conn.Close()
	}
}

// letGo lets go of what this process has from the one that started it and does not need.
func letGo() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return os.Chdir("/")
}

// give gives the descriptors to whoever connected, and reports whether it has thanked for them.
func give(conn *net.UnixConn, fuse, init int) bool {
	conn.SetDeadline(time.Now().Add(thanksTimeout))
	if trusted(conn) != nil || send(conn, "fuse init", fuse, init) != nil {
		return false
	}
	m, err := receive(conn)
	return err == nil && m.text == ok
}

// takeFrom takes the descriptors of the holder that waits at path, if there is one. The holder keeps its own, and waits, until
// the caller calls thanks, which returns when it is about to end and its socket is gone.
func takeFrom(path string) (held map[string]int, thanks func(), err error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	conn.SetDeadline(time.Now().Add(handoverTimeout))
	m, err := message{}, trusted(conn)
	if err == nil {
		m, err = receive(conn)
	}
	if err == nil && len(m.fds) != 2 {
		err = fmt.Errorf("%d descriptors came, not 2", len(m.fds))
	}
	if err != nil {
		for _, fd := range m.fds {
			unix.Close(fd)
		}
		conn.Close()
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return map[string]int{fuseName: m.fds[0], initName: m.fds[1]}, func() {
		send(conn, ok)
		receive(conn) // the end
		conn.Close()
	}, nil
}

// trusted returns an error unless the other side runs as this process's user, which is root.
func trusted(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	err2 := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	if int(peer.Uid) != os.Geteuid() {
		return fmt.Errorf("process %d is user %d's", peer.Pid, peer.Uid)
	}
	return nil
}
