// Package serve is FUSE: the file system that overlayfs asks for the bytes that are not here yet.
//
// A [Server] shows every object of a [fetch.Queue] as a file "a/bcdef…", the name that metadata
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
	"math/bits"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

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
	fd    int      // the connection; file owns it from serve on
	file  *os.File // fd, once it is the server's
	stop  *os.File // closed to wake loop
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
		s := newServer(fd, bytes.Clone(init[:n]), q, logger)
		if err = s.respond(s.init); err == nil {
			err = s.serve()
		}
		if err == nil {
			return s, nil
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
	s := newServer(fd, init, q, logger)
	s.proto.HandleRequest([][]byte{init}, [][]byte{make([]byte, smallAnswer)}) // teaches it what was agreed; the kernel has its answer
	// struct fuse_out_header: a notification has unique 0 and its code in place of the error.
	const notifyResend = 7
	var resend [16]byte
	binary.NativeEndian.PutUint32(resend[0:], uint32(len(resend)))
	binary.NativeEndian.PutUint32(resend[4:], notifyResend)
	if _, err := unix.Write(fd, resend[:]); err != nil {
		return nil, fmt.Errorf("resume FUSE: NOTIFY_RESEND: %w", err)
	}
	if err := s.serve(); err != nil {
		return nil, fmt.Errorf("resume FUSE: %w", err)
	}
	return s, nil
}

func newServer(fd int, init []byte, q *fetch.Queue, logger *slog.Logger) *Server {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return &Server{
		fd:   fd,
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
	}
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
	s.stop.Close()
	return s.Wait()
}

// serve begins to answer. Without an error fd belongs to the server's file; with one nobody has touched it.
//
// The runtime's poller must not know fd: it would hold the lock of its epoll instance while the kernel asks this server
// whether a file of its own, opened in this process, can be polled.
func (s *Server) serve() error {
	woken, stop, err := os.Pipe()
	if err != nil {
		return err
	}
	unix.SetNonblock(s.fd, false) // or NewFile tells the poller
	s.file, s.stop = os.NewFile(uintptr(s.fd), "/dev/fuse"), stop
	unix.SetNonblock(s.fd, true)
	go s.loop(woken)
	return nil
}

// next reads a request into buf. io.EOF says that there will be none: the mount is gone, or the server is to stop.
func (s *Server) next(buf []byte, woken int) (int, error) {
	for {
		n, err := unix.Read(s.fd, buf)
		switch err {
		case nil:
			return n, nil
		case unix.ENODEV:
			return 0, io.EOF
		case unix.ENOENT, unix.EINTR: // the request was interrupted before we could read it
			continue
		case unix.EAGAIN:
		default:
			return 0, fmt.Errorf("FUSE: %w", err)
		}
		wait := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}, {Fd: int32(woken)}}
		if _, err := unix.Poll(wait, -1); err != nil && err != unix.EINTR {
			return 0, fmt.Errorf("FUSE: %w", err)
		}
		if wait[1].Revents != 0 {
			return 0, io.EOF
		}
	}
}

// loop reads requests until the connection ends and answers each in a goroutine of its own: a READ may wait for the network.
func (s *Server) loop(woken *os.File) {
	var answering sync.WaitGroup
	defer close(s.done)
	defer s.file.Close()
	defer answering.Wait()
	defer woken.Close()
	defer s.stop.Close()
	buf := make([]byte, requestBuffer)
	fd := int(woken.Fd())
	for {
		n, err := s.next(buf, fd)
		if err == io.EOF {
			return
		}
		if err != nil {
			s.err = err
			return
		}
		request := bytes.Clone(buf[:n])
		answering.Go(func() {
			if err := s.respond(request); err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ENODEV) {
				s.log.Error("FUSE: the kernel did not take an answer", "err", err)
			}
		})
	}
}

// respond answers a request, if there is an answer to give. ENOENT says that nobody waits for it any more.
func (s *Server) respond(request []byte) error {
	out := buffers.get(answerSize(request))
	defer buffers.put(out)
	n, status := s.proto.HandleRequest([][]byte{request}, [][]byte{out})
	if n == 0 && status.Ok() {
		return nil
	}
	if n == 0 { // not understood; whoever asked must not wait for ever
		// struct fuse_out_header: length, error, unique; the request's unique is at byte 8.
		n = 16
		binary.NativeEndian.PutUint32(out[0:], uint32(n))
		binary.NativeEndian.PutUint32(out[4:], ^uint32(syscall.EIO)+1) // two's complement
		copy(out[8:n], request[8:16])
	}
	// Writing never waits. loop closes the file after the last answer.
	_, err := unix.Write(s.fd, out[:n])
	return err
}

// smallAnswer is more than any answer takes whose size the request does not say.
const smallAnswer = 4096

// answerSize returns how many bytes the answer to a request may have.
func answerSize(request []byte) int {
	// struct fuse_in_header is 40 bytes, its opcode at byte 4. READ, READDIR and READDIRPLUS have the size at byte 16 of
	// fuse_read_in, GETXATTR and LISTXATTR at byte 0 of fuse_getxattr_in.
	const header = 40
	at := 0
	switch opcode := binary.NativeEndian.Uint32(request[4:]); opcode {
	case 15, 28, 44:
		at = header + 16
	case 22, 23:
		at = header
	}
	if at == 0 || len(request) < at+4 {
		return smallAnswer
	}
	return smallAnswer + int(min(binary.NativeEndian.Uint32(request[at:]), maxRead))
}

// A bufferPool lends buffers for answers of smallAnswer bytes and up to 0, 4 KiB, 8 KiB … maxRead more: a READ that waits for the
// network holds one.
type bufferPool [10]sync.Pool

var buffers bufferPool

// class returns which pool has buffers of n bytes, and how large those are.
func (b *bufferPool) class(n int) (pool, size int) {
	pool = bits.Len(uint((n - smallAnswer + 4095) / 4096))
	if pool > 0 && (n-smallAnswer+4095)/4096 == 1<<(pool-1) {
		return pool, smallAnswer + 4096<<(pool-1)
	}
	if pool == 0 {
		return 0, smallAnswer
	}
	return pool + 1, smallAnswer + 4096<<pool
}

func (b *bufferPool) get(n int) []byte {
	pool, size := b.class(n)
	if p, _ := b[pool].Get().(*[]byte); p != nil {
		return *p
	}
	return make([]byte, size)
}

func (b *bufferPool) put(p []byte) {
	pool, _ := b.class(len(p))
	b[pool].Put(&p)
}

// An interruptible is a context that ends when the kernel says that a signal came for the reader.
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

// untilDead returns a context that ends when the thread pid is gone or has a fatal signal.
func untilDead(pid uint32) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { // ends with ctx
		// The kernel tells of the first signal only.
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for !dying(pid) {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
		cancel()
	}()
	return ctx, cancel
}

// dying reports whether a thread is gone or about to be: the kernel makes every fatal signal a SIGKILL that is
// pending for each thread (kernel/signal.c, complete_signal).
func dying(pid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	_, rest, _ := bytes.Cut(b, []byte("\nSigPnd:"))
	mask, _, _ := bytes.Cut(rest, []byte("\n"))
	pending, err := strconv.ParseUint(string(bytes.TrimSpace(mask)), 16, 64)
	return err != nil || pending&(1<<(uint(syscall.SIGKILL)-1)) != 0
}
