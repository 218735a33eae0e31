// Package upper makes a layer of what was written in an overlay mount: in goes the mount's upper directory, out comes
// the layer's table of contents, and the files' contents go into the store.
//
// It is for mounts whose lower layer is a metadata image (see fs/meta) with the store behind it,
// mounted with metacopy=on,redirect_dir=on. There an upper directory holds less than what the layer changes, and a layer
// must stand by itself. So a [Scan] puts back what overlayfs left below:
//
//   - A file whose owner, mode, time or xattrs were changed, or that was renamed, has its metadata in the upper directory
//     and its data where it was (trusted.overlay.metacopy). Its entry has the chunks of the object that the lower
//     file refers to. No data is read or fetched.
//   - A directory that was renamed has only its changes in the upper directory (trusted.overlay.redirect). It becomes an
//     opaque directory with everything that the mount showed in it, merged from both.
//   - Whiteouts, whether devices 0:0 or marked by an xattr, become ".wh.NAME", and opaque directories have
//     ".wh..wh..opq" as their first entry. A whiteout whose name would be too long for that is a device 0:0, which fs/meta takes
//     for the same. In an opaque directory there is nothing to hide, so it has no whiteouts.
//
// # What is left out
//
// Sockets, as in any tar. The xattrs of overlayfs itself, also those that a container
// wrote into its namespace (trusted.overlay.*, which arrive here as trusted.overlay.overlay.*, and user.overlay.*). Names that begin with
// ".wh.": a layer cannot hold them, they would hide other files. The names that lazy layers reserve at the root ([toc.TarName] and
// the landmarks), as with [toc.FromTar]. What a container wrote and loses so is logged.
//
// # Invariants
//
// Nothing outside of the upper directory and Lower is looked at, whatever a container planted: no symlink is
// followed, no mount is crossed, a file is opened once and by its inode, and nothing but a regular file is opened for
// reading. An object has the content that its key names, also if a container still
// writes to the file: what is hashed is either the copy in the store, or a file that nobody else
// has open. Objects have mode 0444, belong to root and have no xattrs. The same tree gives the same entries in the same order.
//
// Memory is that of the table of contents, one directory's names for each level of the tree, and one chunk per worker.
//
// A Scan may be used once at a time. Sources: https://docs.kernel.org/filesystems/overlayfs.html, and in Linux fs/overlayfs/namei.c,
// ovl_check_redirect and ovl_lookup_single; whiteouts, https://github.com/opencontainers/image-spec/blob/main/layer.md.
package upper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A Scan says what to make a layer of.
type Scan struct {
	// Upper is the path of the upper directory.
	Upper string
	// Lower is the path where the metadata image of the layers below is mounted by itself,
	// "" if there are none.
	Lower string
	// Chunks returns the content of an object that Lower refers to, as an entry of a [toc.TOC] has it. The chunks' Member and
	// Inner are not looked at, and the slice is not kept. nil knows no object.
	Chunks func(key toc.Digest) ([]toc.Chunk, bool)
	// Store gets the contents of the files.
	Store *store.Store
	// Move says that nobody writes below Upper any more, and that the upper directory goes away
	// afterwards: its files are renamed into the store, where that is possible, instead of copied. From the first
	// file that is renamed on, the upper directory is marked, and another scan of it is an error: it would miss
	// what has gone.
	Move bool
	// Logger gets what is left out of the layer. nil is silent.
	Logger *slog.Logger
}

// moved is the xattr that marks an upper directory that is no longer complete. It has the prefix that
// a container cannot write, and that overlayfs does not look at.
const moved = "trusted.overlay.lazuli.moved"

// maxWorkers is how many files are hashed at the same time, at most. They wait for the disk as well.
const maxWorkers = 4

// TOC returns the table of contents of the layer: [toc.Whole], parents before what is in them, each directory's names in
// the order of their bytes (a whiteout where the name is that it hides), files in chunks of [toc.DefaultChunkSize] bytes. When it
// returns, the store has every object that it names and that the layers below do not.
//
// Its Digest is the SHA-256 of all entries, with their attributes and the keys of their
// objects, in a form of its own: it is equal for equal layers, and is the digest of no tar.
//
// An error names the file. It is one if a name, an xattr or a time is such that [toc.EntryFromHeader] refuses it, if there are more
// than [toc.MaxEntries] files or [toc.MaxChunks] chunks, and if a file's data is in a
// lower layer and not found there. A file that a container changes meanwhile is none: the layer has
// what was read of it.
func (s *Scan) TOC(ctx context.Context) (*toc.TOC, error) {
	t, err := s.scan(ctx)
	if err != nil {
		return nil, fmt.Errorf("upper directory %s: %w", s.Upper, err)
	}
	return t, nil
}

func (s *Scan) scan(ctx context.Context) (*toc.TOC, error) {
	w := &walk{Scan: s, log: s.Logger, lower: -1, links: map[inode]string{}}
	if w.log == nil {
		w.log = slog.New(slog.DiscardHandler)
	}
	upper, err := openRoot(s.Upper)
	if err != nil {
		return nil, err
	}
	defer unix.Close(upper)
	if s.Lower != "" {
		if w.lower, err = openRoot(s.Lower); err != nil {
			return nil, fmt.Errorf("metadata image %s: %w", s.Lower, err)
		}
		defer unix.Close(w.lower)
	}
	n, err := w.look(upper, ".")
	if err != nil {
		return nil, err
	}
	defer n.close()
	if n.moved {
		return nil, errors.New("files of it were moved into the store by a scan before this one: remove it, and make the snapshot again")
	}
	w.mark = onceMark(upper)
	var tmp unix.Stat_t
	if err := unix.Stat(s.Store.Path("tmp"), &tmp); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	w.move = s.Move && tmp.Dev == n.st.Dev // else nothing can be renamed into the store

	var working context.Context
	w.workers, working = errgroup.WithContext(ctx)
	w.workers.SetLimit(min(runtime.GOMAXPROCS(0), maxWorkers))
	walkErr := w.root(working, n)
	// A worker's error ends the walk, and is why it ended.
	if err := w.workers.Wait(); err != nil {
		return nil, err
	}
	if walkErr != nil {
		return nil, walkErr
	}
	w.names.warn(w.log, s.Upper, "a layer cannot hold names that begin with .wh.: left out")
	w.xattrs.warn(w.log, s.Upper, "xattrs of overlayfs cannot be in a layer: left out")
	return w.toc(), nil
}

// openRoot opens the directory at path, which is the caller's and may lead through symlinks.
func openRoot(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open: %w", err)
	}
	return fd, nil
}

// leftOut counts what is not in the layer.
type leftOut struct {
	count int
	first string
}

func (l *leftOut) add(what string) {
	if l.count++; l.count == 1 {
		l.first = what
	}
}

func (l *leftOut) warn(log *slog.Logger, upper, msg string) {
	if l.count > 0 {
		log.Warn("upper: "+msg, "upper", upper, "count", l.count, "first", l.first)
	}
}
