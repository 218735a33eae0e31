package serve

import (
	"context"
	"encoding/hex"
	"io"
	"log/slog"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"

	"lazuli/fs/fetch"
	"lazuli/fs/store"
)

// Node ids: 1 is the root, firstDir and those behind it the folders, one for each of digits, and objects have the upper bit set.
const (
	digits    = "0123456789abcdef"
	firstDir  = 2
	objectIDs = 1 << 63
)

// forever is for how many seconds the kernel may believe what we say.
const forever = 1 << 32

// objects is the file system of a [Server].
type objects struct {
	fuse.RawFileSystem // for what the kernel does not ask, or once
	q                  *fetch.Queue
	log                *slog.Logger
}

func (o *objects) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	// An object may come to be known later, so ENOENT is not to be remembered.
	folder := in.NodeId - firstDir
	switch {
	case in.NodeId == fuse.FUSE_ROOT_ID && len(name) == 1 && strings.Contains(digits, name):
		return entry(out, firstDir+uint64(strings.Index(digits, name)), 0)
	case folder < uint64(len(digits)) && len(name) == 2*len(store.Key{})-1: // which the root is not: the difference is unsigned
		var key store.Key
		if _, err := hex.Decode(key[:], []byte(digits[folder:folder+1]+name)); err != nil {
			return fuse.ENOENT
		}
		id, size, ok := o.q.Lookup(key)
		if !ok {
			return fuse.ENOENT
		}
		return entry(out, id, size)
	}
	return fuse.ENOENT
}

func entry(out *fuse.EntryOut, id uint64, size int64) fuse.Status {
	out.NodeId, out.EntryValid, out.AttrValid = id, forever, forever
	attributes(&out.Attr, id, size)
	return fuse.OK
}

func attributes(a *fuse.Attr, id uint64, size int64) {
	a.Ino, a.Blksize = id, 4096
	if id < objectIDs {
		a.Mode, a.Nlink = fuse.S_IFDIR|0o555, 2
		return
	}
	a.Mode, a.Nlink = fuse.S_IFREG|0o444, 1
	a.Size, a.Blocks = uint64(size), uint64(size+511)/512
}

func (o *objects) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.AttrValid = forever
	if in.NodeId < objectIDs {
		attributes(&out.Attr, in.NodeId, 0)
		return fuse.OK
	}
	size, ok := o.q.Size(in.NodeId)
	if !ok {
		return fuse.Status(fuse.EIO)
	}
	attributes(&out.Attr, in.NodeId, size)
	return fuse.OK
}

func (o *objects) Read(cancel <-chan struct{}, in *fuse.ReadIn, p []byte) (fuse.ReadResult, fuse.Status) {
	signalled := interruptible{context.Background(), cancel}
	n, err := o.read(signalled, in.NodeId, p, int64(in.Offset))
	if err != nil && signalled.Err() != nil {
		// A signal came. Reads of files do not fail with EINTR, and a page fault that does is a SIGBUS: only
		// who is about to die goes without an answer.
		ctx, cancel := untilDead(in.Pid)
		defer cancel()
		if n, err = o.read(ctx, in.NodeId, p, int64(in.Offset)); err != nil && ctx.Err() != nil {
			return nil, fuse.EINTR
		}
	}
	if err != nil {
		return nil, o.status(err)
	}
	return fuse.ReadResultData(p[:n]), fuse.OK
}

func (o *objects) read(ctx context.Context, id uint64, p []byte, off int64) (int, error) {
	object, err := o.q.Open(id)
	if err != nil {
		return 0, err
	}
	defer object.Close()
	n, err := object.ReadAt(ctx, p, off)
	if err == io.EOF {
		err = nil
	}
	return n, err
}

// status is the one place where an error becomes an errno. What the reader of a file sees says nothing, so it
// is logged.
func (o *objects) status(err error) fuse.Status {
	o.log.Error("read failed", "err", err)
	return fuse.EIO
}

func (o *objects) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.Frsize, out.NameLen = 4096, 4096, 255
	return fuse.OK
}

// Open and Flush tell the kernel not to ask again. Files are opened and closed without us, their pages are kept, and
// neither waits while no server runs. (go-fuse's default is to agree each time.)
func (o *objects) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

func (o *objects) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// A directory shows nothing: objects are looked up by name.
func (o *objects) ReadDir(<-chan struct{}, *fuse.ReadIn, *fuse.DirEntryList) fuse.Status {
	return fuse.OK
}

func (o *objects) ReadDirPlus(<-chan struct{}, *fuse.ReadIn, *fuse.DirEntryList) fuse.Status {
	return fuse.OK
}

func (o *objects) Forget(_, _ uint64) {}

func (o *objects) String() string { return "lazuli" }
