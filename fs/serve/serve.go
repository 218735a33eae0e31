// Package serve is FUSE: the file system that overlayfs asks for the bytes that are not here yet.
//
// A [Server] shows every object of a [fetch.Queue] as a file "ab/cdef…", the name that metadata
// images redirect to. It has four operations of its own: LOOKUP, GETATTR, READ and STATFS; OPEN is
// answered with ENOSYS, after which the kernel does not ask any more, and nothing ever times out,
// since an object never changes. A node id is computed from the object's key, so the server
// keeps no table of what the kernel knows, and FORGET has nothing to do.
//
// That is why a server can be replaced while it is in use. The kernel's side of the mount is
// one file descriptor and what was said in the first request, INIT. Whoever keeps the two
// ([Server.File], [Server.Init]) can start a new server from them ([Resume]) after the old one died: it
// answers INIT once more, to nobody, and asks the kernel to send again what was not answered. The
// readers only wait.
//
// Sources: Linux include/uapi/linux/fuse.h and fs/fuse/dev.c; FUSE_NOTIFY_RESEND needs Linux 6.9.
package serve

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"lazuli/fs/fetch"
)

const (
	// maxRead is the most that the kernel asks for in one READ: its own limit, 256 pages.
	maxRead = 1 << 20
	// The kernel refuses to hand out requests into a smaller buffer than a WRITE needs
	// (fuse_dev_do_read), although no WRITE ever comes.
	requestBuffer = maxRead + 4096
	// maxBackground is how many READs nobody waits for may be under way.
	maxBackground = 64
)

// A Server answers the requests of one FUSE mount.
type Server struct {
	file  *os.File
	init  []byte
	proto *fuse.ProtocolServer
	log   *slog.Logger
	done  chan struct{} // closed when no request comes any more and all are answered
	err   error         // set before done is closed
}

// Mount mounts the objects of q at dir and serves them. After dir is unmounted, and with it every file system that
// was stacked on it, the server ends by itself. A nil logger is silent.
func Mount(dir string, q *fetch.Queue, logger *slog.Logger) (*Server, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/fuse: %w", err)
	}
	// Only root looks at the mount itself; overlayfs uses it with the rights of who mounted the overlay.
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=%d", fd, maxRead)
	if err := unix.Mount("lazuli", dir, "fuse.lazuli", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, options); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mount FUSE at %s: %w", dir, err)
	}
	// The kernel's first request waits for us already.
	init := make([]byte, requestBuffer)
	n, err := unix.Read(fd, init)
	if err == nil {
		var s *Server
		if s, err = newServer(fd, bytes.Clone(init[:n]), q, logger); err == nil {
			if err = s.reply(s.answer(s.init)); err == nil {
				s.serve()
				return s, nil
			}
		}
	}
	unix.Unmount(dir, unix.MNT_DETACH)
	unix.Close(fd)
	return nil, fmt.Errorf("FUSE at %s: INIT: %w", dir, err)
}

// Resume goes on with the mount of a server that is gone, from the descriptor of its
// connection, which the new server owns, and its first request. Requests that the old server took and did not answer
// are answered by the new one. On an error fd is still open.
func Resume(fd int, init []byte, q *fetch.Queue, logger *slog.Logger) (*Server, error) {
	s, err := newServer(fd, init, q, logger)
	if err != nil {
		return nil, fmt.Errorf("resume FUSE: INIT: %w", err)
	}
	s.answer(init) // teaches the protocol what was agreed; the kernel has its answer
	// struct fuse_out_header: a notification has unique 0 and its code in place of the error.
	const notifyResend = 7
	var resend [16]byte
	binary.NativeEndian.PutUint32(resend[0:], uint32(len(resend)))
	binary.NativeEndian.PutUint32(resend[4:], notifyResend)
	if err := s.reply(resend[:]); err != nil {
		return nil, fmt.Errorf("resume FUSE: NOTIFY_RESEND: %w", err)
	}
	s.serve()
	return s, nil
}

func newServer(fd int, init []byte, q *fetch.Queue, logger *slog.Logger) (*Server, error) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // so that reads go through the runtime's poller
		return nil, err
	}
	return &Server{
		file: os.NewFile(uintptr(fd), "/dev/fuse"),
		init: init,
		proto: fuse.NewProtocolServer(&objects{fuse.NewDefaultRawFileSystem(), q, logger}, &fuse.MountOptions{
			MaxWrite:                 maxRead,
			MaxBackground:            maxBackground,
			ExplicitDataCacheControl: true, // objects never change: pages stay
			ExtraCapabilities:        fuse.CAP_HAS_RESEND | fuse.CAP_NO_OPENDIR_SUPPORT,
			// Passthrough costs a level of stacking, so that a container could mount no overlay of its own.
			DisabledCapabilities: fuse.CAP_PASSTHROUGH,
			Logger:               log.New(io.Discard, "", 0),
		}),
		log:  logger,
		done: make(chan struct{}),
	}, nil
}

// File is the connection's descriptor. It belongs to the server; a copy of it, and [Server.Init], outlive the server.
func (s *Server) File() *os.File { return s.file }

// Init returns the kernel's first request, for [Resume].
func (s *Server) Init() []byte { return s.init }

// Wait waits until the server has ended, and says why if it was not because of an unmount.
func (s *Server) Wait() error {
	<-s.done
	return s.err
}

// Stop ends the server without an unmount, after the requests that it took were answered; the mount waits for
// another one.
func (s *Server) Stop() error {
	s.file.SetReadDeadline(unixEpoch)
	return s.Wait()
}

func (s *Server) serve() { go s.loop() }

// loop reads requests until the connection ends and answers each in a goroutine of its own: a READ may wait for the network.
func (s *Server) loop() {
	var answering sync.WaitGroup
	defer close(s.done)
	defer s.file.Close()
	defer answering.Wait()
	buf := make([]byte, requestBuffer)
	for {
		n, err := s.file.Read(buf)
		switch {
		case err == nil:
		case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.EINTR):
			continue // the request was interrupted before we could read it
		case errors.Is(err, syscall.ENODEV), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, io.EOF):
			return
		default:
			if !s.gone() {
				s.err = fmt.Errorf("FUSE: %w", err)
			}
			return
		}
		request := bytes.Clone(buf[:n])
		answering.Go(func() {
			answer := s.answer(request)
			if answer == nil {
				return
			}
			if err := s.reply(answer); err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ENODEV) {
				s.log.Error("FUSE: the kernel did not take an answer", "err", err)
			}
			buffers.Put(&answer)
		})
	}
}

// gone reports whether the mount is. The runtime's poller says of a dead connection only that it cannot be polled.
func (s *Server) gone() bool {
	conn, err := s.file.SyscallConn()
	if err != nil {
		return true
	}
	conn.Control(func(fd uintptr) { _, err = unix.Read(int(fd), make([]byte, requestBuffer)) })
	return errors.Is(err, syscall.ENODEV)
}

// answer returns the answer to a request, or nil if there is none to give.
func (s *Server) answer(request []byte) []byte {
	p := buffers.Get().(*[]byte)
	out := (*p)[:cap(*p)]
	n, _ := s.proto.HandleRequest([][]byte{request}, [][]byte{out})
	if n == 0 {
		buffers.Put(p)
		return nil
	}
	return out[:n]
}

func (s *Server) reply(answer []byte) error {
	conn, err := s.file.SyscallConn()
	if err != nil {
		return err
	}
	var writeErr error
	if err := conn.Control(func(fd uintptr) { _, writeErr = unix.Write(int(fd), answer) }); err != nil {
		return err
	}
	return writeErr
}

// buffers are for answers.
var buffers = sync.Pool{New: func() any { b := make([]byte, requestBuffer); return &b }}

// An interruptible is a context that ends when the kernel says that the reader is gone.
type interruptible struct {
	context.Context
	cancel <-chan struct{}
}

func (c interruptible) Done() <-chan struct{} { return c.cancel }

func (c interruptible) Err() error {
	select {
	case <-c.cancel:
		return context.Canceled
	default:
		return nil
	}
}
