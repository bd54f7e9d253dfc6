; The probe: a guest in ten sectors. It boots under a PC BIOS from a floppy or from the disk under test, takes commands
; over COM1, and answers with what the BIOS reads from the disk. See README.md beside this file for the protocol.
;
;   build: nasm -f bin -o probe.bin probe.asm
;
; Memory   0x07c00  this program (boot sector and the rest, loaded by the boot sector), stack below it
;          0x09800  an AHCI command                0x0a400  the line that goes out
;          0x0b000  CRC-32 tables, four of 1 KiB
;          0x0c000  the line that came in          0x20000  the buffer: sectors read or to be written

bits 16
cpu 386
org 0x7c00

PROBE_SECTORS   equ 10
PROTOCOL        equ '1'
COM1            equ 0x3f8
DEBUG_EXIT      equ 0x501               ; -device isa-debug-exit,iobase=0x501,iosize=1
ACPI_PM1A       equ 0x604               ; where SeaBIOS puts PM1a_CNT, on pc and on q35
IN_LINE         equ 0xc000
IN_MAX          equ 0x3f00
OUT_LINE        equ 0xa400
TABLES          equ 0xb000
BUFFER_SEGMENT  equ 0x2000
BATCH           equ 127                 ; sectors a BIOS call may move
ATA_TABLE       equ 0x9800              ; command table of an AHCI port, below the line that goes out
ATA_FLUSH       equ 0xe7
ATA_TRIM        equ 0x06                ; DATA SET MANAGEMENT, with feature 1
TRIM_ENTRIES    equ 64                  ; of 8 bytes: LBA (48 bits), sectors (16 bits)

start:
        cli
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7c00
        sti
        cld
        jmp     0:.here
.here:
        mov     [boot_drive], dl
        test    dl, 0x80
        jnz     .from_disk
        mov     ax, 0x0200 + PROBE_SECTORS - 1  ; floppy: the rest is on track 0
        mov     bx, rest
        mov     cx, 0x0002
        mov     dh, 0
        int     0x13
        jc      .failed
        jmp     main
.from_disk:
        mov     [disk], dl
        mov     word [packet.count], PROBE_SECTORS - 1
        mov     word [packet.offset], rest
        mov     dword [packet.lba], 1
        mov     si, packet
        mov     ah, 0x42
        int     0x13
        jnc     main
.failed:
        mov     al, '!'                 ; nothing else can be said yet
        mov     dx, COM1
        out     dx, al
        hlt
        jmp     .failed

boot_drive      db 0
disk            db 0x80

        align 4
packet:                                 ; disk address packet of INT 13h, AH = 42h and 43h
        db      16, 0
.count  dw      0
.offset dw      0
.segment dw     0
.lba    dd      0, 0

        times 510 - ($ - $$) db 0
        dw      0xaa55

rest:
main:
        mov     word [packet.segment], BUFFER_SEGMENT
        mov     word [packet.offset], 0
        call    serial_init
        call    make_tables
        mov     dword [sequence], '00'
        call    begin_ok
        call    hello
        call    send
next_line:
        call    get_line
        call    check_line
        jc      next_line
        mov     bx, commands
.command:
        mov     di, [bx]
        add     bx, 2
        test    di, di
        jz      .unknown
        mov     si, IN_LINE + 3
.letter:
        mov     al, [bx]
        inc     bx
        test    al, al
        jz      .last
        cmp     al, [si]
        jne     .skip
        inc     si
        jmp     .letter
.last:
        cmp     byte [si], ' '          ; the end of the word, or of the line?
        ja      .command
        jmp     di                      ; SI is at the arguments
.skip:
        mov     al, [bx]
        inc     bx
        test    al, al
        jnz     .skip
        jmp     .command
.unknown:
        mov     bx, text_unknown
fail_text:                              ; answer "err" and the text at BX
        push    bx
        mov     bx, text_err
        call    begin
        pop     bx
        call    put_text
        call    send
        jmp     next_line

; ---- commands ------------------------------------------------------------------------------------------------------

do_hello:
        call    check_end
        jc      fail_usage
        call    begin_ok
        call    hello
        call    send
        jmp     next_line

hello:                                  ; "probe VERSION DRIVE": what this is, and where it was booted from
        mov     bx, text_probe
        call    put_text
        mov     al, [boot_drive]
        jmp     put_byte

do_size:                                ; sectors of the disk, by AH = 48h
        call    check_end
        jc      fail_usage
        mov     word [parameters], 30
        mov     dl, [disk]
        mov     si, parameters
        mov     ah, 0x48
        int     0x13
        jc      fail_bios
        call    begin_ok
        mov     eax, [parameters + 20]
        call    put_long
        mov     eax, [parameters + 16]
        call    put_long
        call    send
        jmp     next_line

do_crc:                                 ; CRC-32 of COUNT sectors from LBA on
        call    get_range
        jc      fail_usage
        mov     dword [crc], 0xffffffff
.batch:
        call    next_batch
        jz      .done
        call    read_batch
        jc      fail_bios
        mov     cx, [packet.count]
        call    crc_buffer
        call    advance
        jmp     .batch
.done:
        call    begin_ok
        mov     eax, [crc]
        not     eax
        call    put_long
        call    send
        jmp     next_line

do_dump:                                ; one sector in hex
        call    get_number
        jc      fail_usage
        call    check_end
        jc      fail_usage
        mov     [packet.lba], eax
        mov     [packet.lba + 4], edx
        mov     word [packet.count], 1
        call    read_batch
        jc      fail_bios
        call    begin_ok
        mov     ax, BUFFER_SEGMENT
        mov     fs, ax
        xor     si, si
        mov     cx, 512
.byte:
        mov     al, [fs:si]
        inc     si
        call    put_byte
        loop    .byte
        call    send
        jmp     next_line

do_pattern:                             ; write the pattern of SEED over COUNT sectors from LBA on
        call    get_number
        jc      fail_usage
        test    edx, edx                ; a seed has 32 bits
        jnz     fail_usage
        mov     [seed], eax
        call    get_range
        jc      fail_usage
.batch:
        call    next_batch
        jz      .done
        call    fill_batch
        mov     dl, [disk]
        mov     si, packet
        mov     ax, 0x4300
        int     0x13
        jc      fail_bios
        call    advance
        jmp     .batch
.done:
        call    begin_ok
        call    send
        jmp     next_line

do_disk:                                ; answer for BIOS drive 80h + NUMBER from now on
        call    get_number
        jc      fail_usage
        call    check_end
        jc      fail_usage
        test    edx, edx
        jnz     fail_usage
        cmp     eax, 0x7f
        ja      fail_usage
        or      al, 0x80
        mov     [disk], al
        call    begin_ok
        call    send
        jmp     next_line

do_load:                                ; put the bytes of HEX into the buffer, from its sector AT on
        call    get_number
        jc      fail_usage
        test    edx, edx
        jnz     fail_usage
        cmp     eax, BATCH - 1
        ja      fail_usage
        shl     ax, 5                   ; a sector is 32 paragraphs
        add     ax, BUFFER_SEGMENT
        mov     es, ax
        xor     di, di
.blank:
        lodsb
        cmp     al, ' '
        je      .blank
.byte:
        test    al, al
        jz      .end
        call    digit
        jc      .bad
        mov     ah, al
        shl     ah, 4
        lodsb
        call    digit
        jc      .bad
        or      al, ah
        stosb
        lodsb
        jmp     .byte
.end:
        xor     ax, ax
        mov     es, ax
        call    begin_ok
        call    send
        jmp     next_line
.bad:
        xor     ax, ax
        mov     es, ax
        jmp     fail_usage

digit:                                  ; AL = the value of the digit in AL; carry when it is none
        sub     al, '0'
        cmp     al, 9
        jbe     .good
        sub     al, 'a' - '0' - 10
        cmp     al, 10
        jb      .bad
        cmp     al, 15
        ja      .bad
.good:
        clc
        ret
.bad:
        stc
        ret

do_write:                               ; write the first COUNT sectors of the buffer, in one call of the BIOS
        call    get_one_batch
        jc      fail_usage
        mov     dl, [disk]
        mov     si, packet
        mov     ax, 0x4300
        int     0x13
        jc      fail_bios
        call    begin_ok
        call    send
        jmp     next_line

do_fetch:                               ; read COUNT sectors into the buffer, in one call, and answer with their CRC-32
        call    get_one_batch
        jc      fail_usage
        call    read_batch
        jc      fail_bios
        mov     dword [crc], 0xffffffff
        mov     cx, [packet.count]
        call    crc_buffer
        call    begin_ok
        mov     eax, [crc]
        not     eax
        call    put_long
        call    send
        jmp     next_line

do_flush:                               ; let the disk write its cache out; on AHCI, past the BIOS, which has no word for it
        call    check_end
        jc      fail_usage
        mov     byte [ata.command], ATA_FLUSH
        mov     word [ata.header], 5    ; a command of five dwords, no data
        mov     word [ata.entries], 0
        mov     byte [ata.feature], 0
        mov     byte [ata.count], 0
        jmp     ata_answer

do_discard:                             ; tell the disk that COUNT sectors from LBA on are not needed; on AHCI
        call    get_range
        jc      fail_usage
        mov     ax, BUFFER_SEGMENT
        mov     es, ax
        xor     di, di
        xor     ax, ax
        mov     cx, 256
        rep     stosw
        xor     di, di
        mov     cx, TRIM_ENTRIES
.entry:
        mov     eax, 0xffff
        cmp     dword [left + 4], 0
        jne     .set
        cmp     [left], eax
        jae     .set
        mov     eax, [left]
.set:
        mov     [packet.count], ax
        mov     ebx, [packet.lba]
        mov     [es:di], ebx
        mov     bx, [packet.lba + 4]
        mov     [es:di + 4], bx
        mov     [es:di + 6], ax
        add     di, 8
        call    advance
        mov     eax, [left]
        or      eax, [left + 4]
        loopnz  .entry
        push    word 0
        pop     es
        jnz     fail_usage              ; more than a command has room for
        mov     byte [ata.command], ATA_TRIM
        mov     word [ata.header], 5 | 0x40     ; which the disk is to read 512 bytes for
        mov     word [ata.entries], 1
        mov     byte [ata.feature], 1
        mov     byte [ata.count], 1
ata_answer:
        call    ata_run
        jc      .failed
        call    begin_ok
        call    send
        jmp     next_line
.failed:
        mov     [status], al
        mov     bx, text_err
        call    begin
        mov     bx, text_ata
        call    put_text
        mov     al, [status]
        call    put_byte
        call    send
        jmp     next_line

ata_run:                                ; give [ata] to the disk; carry and AL: its error register, or ff when it is not on AHCI
        mov     al, [disk]
        call    find_port
        mov     al, 0xff
        jc      .end
        push    word 0
        pop     es
        push    edi
        mov     di, ATA_TABLE
        mov     cx, 0x90 / 2
        xor     ax, ax
        rep     stosw
        pop     edi
        mov     word [ATA_TABLE], 0x8027        ; a register FIS that is a command
        mov     al, [ata.command]
        mov     ah, [ata.feature]
        mov     [ATA_TABLE + 2], ax
        mov     byte [ATA_TABLE + 7], 0x40      ; LBA
        mov     al, [ata.count]
        mov     [ATA_TABLE + 12], al
        mov     dword [ATA_TABLE + 0x80], BUFFER_SEGMENT * 16
        mov     dword [ATA_TABLE + 0x8c], 511   ; bytes less one
        mov     esi, [fs:edi]                   ; PxCLB: the BIOS's list, whose first slot it fills anew for each command
        mov     eax, [ata.header]
        mov     [fs:esi], eax
        mov     dword [fs:esi + 4], 0
        mov     dword [fs:esi + 8], ATA_TABLE
        mov     dword [fs:esi + 12], 0
        mov     dword [fs:edi + 0x30], -1       ; PxSERR
        mov     dword [fs:edi + 0x10], -1       ; PxIS
        mov     dword [fs:edi + 0x38], 1        ; PxCI: slot 0
.wait:
        test    dword [fs:edi + 0x10], 1 << 30  ; a task file error stops the port with the slot set
        jnz     .done
        test    dword [fs:edi + 0x38], 1
        jnz     .wait
.done:
        mov     eax, [fs:edi + 0x20]            ; PxTFD: status, error
        mov     dword [fs:edi + 0x10], -1
        test    al, 1
        mov     al, ah
        jz      .end                            ; TEST has cleared the carry
        stc
.end:
        sti
        ret

find_port:                              ; FS:EDI = the registers of the AHCI port of BIOS drive AL; carry when there is none
        movzx   ebp, al
        and     bp, 0x7f
        mov     ebx, 0x80000008                 ; class and revision of bus 0, device 0, function 0
.device:
        mov     eax, ebx
        call    read_pci
        shr     eax, 8
        cmp     eax, 0x010601                   ; SATA, AHCI
        je      .found
        add     ebx, 0x100
        cmp     ebx, 0x80010008
        jb      .device
.none:
        stc
        ret
.found:
        lea     eax, [ebx + 0x24 - 8]           ; BAR 5
        call    read_pci
        and     al, 0xf0
        mov     edi, eax
        shl     ebp, 7
        lea     edi, [edi + ebp + 0x100]
        cli                                     ; on with a limit of 4 GiB in FS, which the BIOS takes away again
        lgdt    [gdt]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        mov     bx, 8
        mov     fs, bx
        and     al, 0xfe
        mov     cr0, eax
        xor     bx, bx
        mov     fs, bx
        mov     eax, [fs:edi + 0x28]            ; PxSSTS: is a device there, and talking?
        and     al, 0x0f
        cmp     al, 3
        jne     .none
        cmp     dword [fs:edi + 0x24], 0x101    ; PxSIG: a disk
        jne     .none
        clc
        ret

read_pci:                               ; EAX = the configuration register at address EAX
        mov     dx, 0xcf8
        out     dx, eax
        mov     dx, 0xcfc
        in      eax, dx
        ret

do_off:                                 ; answer, then leave by the debug port, else by ACPI, else stand still
        call    get_number
        jc      fail_usage
        call    check_end
        jc      fail_usage
        test    edx, edx
        jnz     fail_usage
        cmp     eax, 0x7f               ; QEMU's own exit status, 2 * STATUS + 1, has a byte
        ja      fail_usage
        push    ax
        call    begin_ok
        call    send
        call    drain
        pop     ax
        mov     dx, DEBUG_EXIT
        out     dx, al
        mov     dx, ACPI_PM1A
        mov     ax, 0x2000              ; SLP_EN, SLP_TYP 0: soft off
        out     dx, ax
.stand:
        cli
        hlt
        jmp     .stand

fail_usage:
        mov     bx, text_usage
        jmp     fail_text

fail_bios:                              ; AH has what INT 13h says is wrong
        mov     [status], ah
        mov     bx, text_err
        call    begin
        mov     bx, text_bios
        call    put_text
        mov     al, [status]
        call    put_byte
        call    send
        jmp     next_line

; ---- ranges of sectors ---------------------------------------------------------------------------------------------

get_range:                              ; LBA and COUNT, the last arguments; carry when that is not what is there
        call    get_number
        jc      .no
        mov     [packet.lba], eax
        mov     [packet.lba + 4], edx
        call    get_number
        jc      .no
        mov     [left], eax
        mov     [left + 4], edx
        call    check_end
.no:
        ret

get_one_batch:                          ; LBA and COUNT of 1 to BATCH sectors, into the packet; carry when not so
        call    get_range
        jc      .no
        cmp     dword [left + 4], 0
        jne     .bad
        mov     eax, [left]
        dec     eax
        cmp     eax, BATCH - 1
        ja      .bad
        inc     ax
        mov     [packet.count], ax
        clc
        ret
.bad:
        stc
.no:
        ret

next_batch:                             ; set the packet's count; ZF when nothing is left
        mov     eax, BATCH
        cmp     dword [left + 4], 0
        jne     .set
        cmp     [left], eax
        jae     .set
        mov     eax, [left]
.set:
        mov     [packet.count], ax
        test    ax, ax
        ret

advance:
        movzx   eax, word [packet.count]
        add     [packet.lba], eax
        adc     dword [packet.lba + 4], 0
        sub     [left], eax
        sbb     dword [left + 4], 0
        ret

read_batch:
        mov     dl, [disk]
        mov     si, packet
        mov     ah, 0x42
        int     0x13
        ret

fill_batch:                             ; the pattern of each sector in the packet; see README.md
        mov     ax, BUFFER_SEGMENT
        mov     es, ax
        xor     di, di
        mov     cx, [packet.count]
        mov     esi, [packet.lba]
        mov     ebp, [packet.lba + 4]
.sector:
        imul    eax, esi, 0x9e3779b1
        imul    ebx, ebp, 0x85ebca77
        xor     eax, ebx
        xor     eax, [seed]
        jnz     .mix
        mov     eax, 0x6d2b79f5         ; xorshift never leaves 0
.mix:
        mov     dx, 128
.word:
        mov     ebx, eax
        shl     ebx, 13
        xor     eax, ebx
        mov     ebx, eax
        shr     ebx, 17
        xor     eax, ebx
        mov     ebx, eax
        shl     ebx, 5
        xor     eax, ebx
        stosd
        dec     dx
        jnz     .word
        add     esi, 1
        adc     ebp, 0
        loop    .sector
        xor     ax, ax
        mov     es, ax
        ret

; ---- CRC-32 (polynomial 0xedb88320, as zlib), four bytes a step ----------------------------------------------------

make_tables:
        xor     ebx, ebx
.entry:
        mov     eax, ebx
        mov     cx, 8
.bit:
        shr     eax, 1
        jnc     .even
        xor     eax, 0xedb88320
.even:
        loop    .bit
        mov     [ebx * 4 + TABLES], eax
        inc     bx
        cmp     bx, 256
        jb      .entry
        xor     ebx, ebx                ; table n + 1 is table n pushed on by a zero byte
.next:
        mov     eax, [ebx * 4 + TABLES]
        movzx   ecx, al
        shr     eax, 8
        xor     eax, [ecx * 4 + TABLES]
        mov     [ebx * 4 + TABLES + 1024], eax
        inc     bx
        cmp     bx, 768
        jb      .next
        ret

crc_buffer:                             ; CX sectors at BUFFER_SEGMENT into [crc]
        shl     cx, 7                   ; in steps of four bytes
        mov     ax, BUFFER_SEGMENT
        mov     fs, ax
        xor     si, si
        mov     eax, [crc]
.step:
        xor     eax, [fs:si]
        movzx   ebx, al
        mov     edx, [ebx * 4 + TABLES + 3072]
        movzx   ebx, ah
        xor     edx, [ebx * 4 + TABLES + 2048]
        shr     eax, 16
        movzx   ebx, al
        xor     edx, [ebx * 4 + TABLES + 1024]
        movzx   ebx, ah
        xor     edx, [ebx * 4 + TABLES]
        mov     eax, edx
        add     si, 4
        dec     cx
        jnz     .step
        mov     [crc], eax
        ret

crc_text:                               ; EAX = CRC-32 of CX bytes at SI
        mov     eax, 0xffffffff
        jcxz    .done
.byte:
        movzx   ebx, byte [si]
        xor     bl, al
        shr     eax, 8
        xor     eax, [ebx * 4 + TABLES]
        inc     si
        loop    .byte
.done:
        not     eax
        ret

; ---- lines in ------------------------------------------------------------------------------------------------------

get_line:                               ; a line without its end into IN_LINE, its length into [in_length]
        mov     di, IN_LINE
.char:
        cli
        mov     dx, COM1 + 5
        in      al, dx
        test    al, 1
        jnz     .there
        sti                             ; takes effect after hlt has begun: no interrupt is missed between the two
        hlt                             ; asking on and on would keep the host's other threads from bringing more
        jmp     .char
.there:
        sti
        mov     dx, COM1
        in      al, dx
        cmp     al, 13
        je      .char
        cmp     al, 10
        je      .end
        cmp     di, IN_LINE + IN_MAX
        jae     .char                   ; too long: its sum cannot fit
        stosb
        jmp     .char
.end:
        mov     byte [di], 0
        sub     di, IN_LINE
        mov     [in_length], di
        ret

check_line:                             ; "SS WORD ... *CCCCCCCC": check the sum, keep SS, cut the sum off; carry when bad
        mov     dword [sequence], '??'
        mov     cx, [in_length]
        sub     cx, 10
        jbe     .bad
        mov     si, IN_LINE
        add     si, cx
        cmp     word [si], ' *'
        jne     .bad
        mov     byte [si], 0
        push    si
        mov     si, IN_LINE
        call    crc_text
        pop     si
        mov     edi, eax
        add     si, 2
        call    get_number
        jc      .bad
        cmp     eax, edi
        jne     .bad
        mov     ax, [IN_LINE]
        mov     [sequence], ax
        clc
        ret
.bad:
        mov     bx, text_err
        call    begin
        mov     bx, text_sum
        call    put_text
        call    send
        stc
        ret

check_end:                              ; carry when the line has another word
        cmp     byte [si], ' '
        ja      .more
        jne     .end
        inc     si
        jmp     check_end
.more:
        stc
        ret
.end:
        clc
        ret

get_number:                             ; EDX:EAX = the hexadecimal number at SI; carry when the word there is none
        cmp     byte [si], ' '
        jne     .begin
        inc     si
        jmp     get_number
.begin:
        xor     eax, eax
        xor     edx, edx
        xor     cx, cx
.digit:
        movzx   ebx, byte [si]
        sub     bl, '0'
        cmp     bl, 9
        jbe     .take
        sub     bl, 'a' - '0' - 10
        cmp     bl, 10
        jb      .end
        cmp     bl, 15
        ja      .end
.take:
        shld    edx, eax, 4
        shl     eax, 4
        or      al, bl
        inc     si
        inc     cx
        jmp     .digit
.end:
        jcxz    .no
        cmp     cx, 16
        ja      .no
        cmp     byte [si], ' '
        ja      .no
        clc
        ret
.no:
        stc
        ret

; ---- lines out -----------------------------------------------------------------------------------------------------

begin_ok:
        mov     bx, text_ok
begin:                                  ; begin an answer: the sequence and the text at BX
        mov     ax, [sequence]
        mov     di, OUT_LINE
        stosw
        mov     [out_end], di
put_text:
        mov     di, [out_end]
.char:
        mov     al, [bx]
        inc     bx
        test    al, al
        jz      .end
        stosb
        jmp     .char
.end:
        mov     [out_end], di
        ret

put_long:                               ; EAX as eight digits
        push    eax
        shr     eax, 16
        call    put_word
        pop     eax
put_word:
        push    ax
        mov     al, ah
        call    put_byte
        pop     ax
put_byte:
        push    ax
        shr     al, 4
        call    put_digit
        pop     ax
        and     al, 15
put_digit:
        add     al, '0'
        cmp     al, '9'
        jbe     .store
        add     al, 'a' - '9' - 1
.store:
        mov     di, [out_end]
        stosb
        mov     [out_end], di
        ret

send:                                   ; add the sum, send the line
        mov     cx, [out_end]
        sub     cx, OUT_LINE
        mov     si, OUT_LINE
        call    crc_text
        push    eax
        mov     bx, text_star
        call    put_text
        pop     eax
        call    put_long
        mov     bx, text_end
        call    put_text
        mov     si, OUT_LINE
.char:
        cmp     si, [out_end]
        je      .done
        mov     dx, COM1 + 5
.wait:
        in      al, dx
        test    al, 0x20
        jz      .wait
        lodsb
        mov     dx, COM1
        out     dx, al
        jmp     .char
.done:
        ret

drain:                                  ; wait until the last character has left
        mov     dx, COM1 + 5
.wait:
        in      al, dx
        test    al, 0x40
        jz      .wait
        ret

serial_init:                            ; 115200 baud, 8N1, FIFOs on, an interrupt when a character is there
        mov     word [0x0c * 4], on_serial
        mov     word [0x0c * 4 + 2], 0
        in      al, 0x21                ; IRQ 4, which the BIOS leaves masked
        and     al, 0xef
        out     0x21, al
        mov     si, .settings
.next:
        lodsw
        test    al, al
        js      .done
        movzx   dx, al
        add     dx, COM1
        mov     al, ah
        out     dx, al
        jmp     .next
.done:
        ret
.settings:
        db      1, 0x00, 3, 0x80, 0, 0x01, 1, 0x00, 3, 0x03, 2, 0xc7, 4, 0x0b, 1, 0x01, 0xff, 0xff

on_serial:                              ; wakes get_line, no more
        push    ax
        mov     al, 0x20
        out     0x20, al
        pop     ax
        iret

commands:                               ; where each is handled, and its word
        dw      do_hello
        db      'hello', 0
        dw      do_size
        db      'size', 0
        dw      do_crc
        db      'crc', 0
        dw      do_dump
        db      'dump', 0
        dw      do_pattern
        db      'pattern', 0
        dw      do_disk
        db      'disk', 0
        dw      do_load
        db      'load', 0
        dw      do_write
        db      'write', 0
        dw      do_fetch
        db      'fetch', 0
        dw      do_flush
        db      'flush', 0
        dw      do_discard
        db      'discard', 0
        dw      do_off
        db      'off', 0
        dw      0

text_ok         db ' ok ', 0
text_err        db ' err ', 0
text_probe      db 'probe ', PROTOCOL, ' ', 0
text_star       db ' *', 0
text_end        db 13, 10, 0
text_unknown    db 'unknown', 0
text_usage      db 'usage', 0
text_sum        db 'sum', 0
text_bios       db 'bios ', 0
text_ata        db 'ata ', 0

        align 8
gdt:                                    ; its first entry is not used: the register's value has its place
        dw      15, gdt, 0, 0
        dw      0xffff, 0, 0x9200, 0x00cf       ; data, from 0, of 4 GiB
ata:                                    ; the command for the disk
.header dw      0
.entries dw     0
.command db     0
.feature db     0
.count  db      0
        align 4
crc             dd 0
left            dd 0, 0
seed            dd 0
sequence        dd 0
in_length       dw 0
out_end         dw 0
status          db 0
        align 4
parameters      times 32 db 0

        times PROBE_SECTORS * 512 - ($ - $$) db 0
